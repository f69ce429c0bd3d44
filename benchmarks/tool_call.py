"""What a sandboxed tool call costs beside a bare process.

    python benchmarks/tool_call.py [--seconds 40]

Runs `sh -c true` in five ways that take turns, so that a busy machine disturbs all of them alike:

- bare: `posix_spawn` and `waitpid` in a loop; several callers are several processes
- server, socket: a `bash` call through a slot server's HTTP API over a unix socket, measured as bare is: blocking, several
  callers are several processes
- server, unix / tcp: the same by the asynchronous client that the local backend uses; several callers are tasks of one process
- bubblewrap per call: a new box for each command, with the options that a slot's box has

and prints the median time of a call with one caller, and the calls per second with 1 and 8 callers on 8 slots. Needs
bubblewrap.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.client import SlotServerClient
from backends.codec import EncodedCall
from sandbox_image.protocol import ExecuteRequest

CALLERS = 8
ROUNDS = 8
COMMAND = ["/bin/sh", "-c", "true"]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}

Way = Callable[[int, float], Awaitable[list[list[float]]]]
"""Runs the command from a number of callers for some seconds; the seconds of each call of each caller."""


@dataclass
class Measurement:
    """All that was measured of one way to run a command: seconds per call with one caller, and rates."""

    alone: list[float] = field(default_factory=list)
    rates: dict[int, list[float]] = field(default_factory=dict)

    @property
    def p50(self) -> float:
        """The median time of a call with one caller, in seconds."""
        return statistics.median(self.alone)

    def rate(self, callers: int) -> float:
        """Calls per second, the median over the rounds."""
        return statistics.median(self.rates[callers])


def spawn_until(argv: list[str], deadline: float) -> list[float]:
    """Spawn and wait for a command over and over; the seconds that each took."""
    times = []
    while (start := time.perf_counter()) < deadline:
        os.waitpid(os.posix_spawn(argv[0], argv, ENVIRONMENT), 0)
        times.append(time.perf_counter() - start)
    return times


def call_until(socket_path: str, slot: int, deadline: float) -> list[float]:
    """As `spawn_until`, through the HTTP API of a slot server: a blocking socket, no library."""
    body = call_of(slot).body
    request = f"POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    times = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(socket_path)
        while (start := time.perf_counter()) < deadline:
            connection.sendall(request)
            answer = connection.recv(65536)
            head, _, result = answer.partition(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            while len(result) < length:
                result += connection.recv(65536)
            outcome = json.loads(result)
            times.append(time.perf_counter() - start)
            assert outcome["success"], outcome
    return times


async def in_processes(work: Callable[[int, float], list[float]], callers: int, seconds: float) -> list[list[float]]:
    """Let each caller work until a deadline in a process of its own: no interpreter lock stands between them."""
    if callers == 1:
        return [work(0, time.perf_counter() + seconds)]
    context = multiprocessing.get_context("fork")
    times = context.SimpleQueue()
    start = context.Barrier(callers)

    def run(caller: int) -> None:
        start.wait()
        times.put(work(caller, time.perf_counter() + seconds))

    workers = [context.Process(target=run, args=(caller,)) for caller in range(callers)]
    for worker in workers:
        worker.start()
    taken = [times.get() for _ in workers]
    for worker in workers:
        worker.join()
    return taken


async def spawn(argv: list[str], callers: int, seconds: float) -> list[list[float]]:
    """Spawn a command from several callers."""
    return await in_processes(lambda caller, deadline: spawn_until(argv, deadline), callers, seconds)


def call_of(slot: int) -> EncodedCall:
    """The request of caller number `slot`."""
    return EncodedCall.of(ExecuteRequest(f"slot_{slot}", "bash", {"command": "true"}, timeout=30.0))


async def call_server(client: SlotServerClient, callers: int, seconds: float) -> list[list[float]]:
    """Call a slot server from as many tasks as there are callers, each with its own slot."""
    deadline = time.perf_counter() + seconds

    async def work(slot: int) -> list[float]:
        call = call_of(slot)
        times = []
        while (start := time.perf_counter()) < deadline:
            result = await client.execute(call)
            times.append(time.perf_counter() - start)
            assert result.success, result
        return times

    return await asyncio.gather(*map(work, range(callers)))


async def call_blocking(socket_path: str, callers: int, seconds: float) -> list[list[float]]:
    """Call a slot server as `spawn` spawns: blocking, each caller in a process of its own."""
    return await in_processes(lambda caller, deadline: call_until(socket_path, caller, deadline), callers, seconds)


@contextmanager
def slot_server(directory: Path) -> Iterator[tuple[int, str]]:
    """A slot server; its port and the path of its unix socket."""
    socket_path = str(directory / "socket")
    command = [sys.executable, "-m", "sandbox_image.server", "--die-with-parent", "--slots", str(CALLERS), "--port", "0"]
    command += ["--unix-socket", socket_path, "--data-dir", str(directory / "data")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit("the slot server did not start")
        yield json.loads(line)["port"], socket_path
        process.terminate()


async def measure(directory: Path, seconds: float) -> dict[str, Measurement]:
    """Let every way have its turn, again and again."""
    with slot_server(directory) as (port, socket_path):
        async with (
            SlotServerClient(unix_socket=Path(socket_path)) as over_unix,
            SlotServerClient(url=f"http://127.0.0.1:{port}") as over_tcp,
        ):
            ways: dict[str, Way] = {
                "bare": lambda callers, share: spawn(COMMAND, callers, share),
                "server, socket": lambda callers, share: call_blocking(socket_path, callers, share),
                "server, unix": lambda callers, share: call_server(over_unix, callers, share),
                "server, tcp": lambda callers, share: call_server(over_tcp, callers, share),
                "bubblewrap per call": lambda callers, share: spawn(bubblewrap(directory), callers, share),
            }
            results = {name: Measurement() for name in ways}
            share = seconds / (2 * ROUNDS * len(ways))
            for way in ways.values():
                await way(CALLERS, 0.1)
            for _ in range(ROUNDS):
                for callers in (1, CALLERS):
                    for name, way in ways.items():
                        times = await way(callers, share)
                        rate = sum(len(own) / sum(own) for own in times)
                        results[name].rates.setdefault(callers, []).append(rate)
                        if callers == 1:
                            results[name].alone += times[0]
    return results


def bubblewrap(directory: Path) -> list[str]:
    """The command line of a box that runs one command."""
    program = shutil.which("bwrap")
    if program is None:
        sys.exit("bubblewrap is not installed")
    workspace = directory / "workspace"
    workspace.mkdir(exist_ok=True)
    links = [word for name in ("bin", "lib", "lib64") for word in ("--symlink", f"usr/{name}", f"/{name}")]
    closed = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr", *links]
    writable = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--bind", str(workspace), "/workspace"]
    return [program, *closed, *writable, "--remount-ro", "/", "--chdir", "/workspace", "--", *COMMAND]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="for everything together")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="tool-call-") as directory:
        results = asyncio.run(measure(Path(directory), seconds))
    bare = results["bare"]
    rows = [f"{'':22}{'p50 ms':>9}{'x bare':>9}{'calls/s, 1':>13}{f'calls/s, {CALLERS}':>13}{'of bare':>9}"]
    for name, result in results.items():
        many = result.rate(CALLERS)
        rows.append(
            f"{name:22}{result.p50 * 1000:9.3f}{result.p50 / bare.p50:9.2f}"
            f"{result.rate(1):13.0f}{many:13.0f}{many / bare.rate(CALLERS):9.2f}"
        )
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
