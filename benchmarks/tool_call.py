"""What a sandboxed tool call costs beside a bare process.

    python benchmarks/tool_call.py [--seconds 20] [--full]

Runs `sh -c true` in seven ways that take turns, so that a busy machine disturbs all of them alike:

- bare: `posix_spawn` and `waitpid` in a loop; several callers are several processes
- server, socket: a `bash` call through a slot server's HTTP API over a unix socket, measured as bare is: blocking, several
  callers are several processes
- server, unix / tcp: the same by the asynchronous client that the local backend uses; several callers are tasks of one process
- server, dispatched: the same through the dispatcher of a backend, which lets calls of several callers travel together
- server, aiohttp: the same request by aiohttp's client over the unix socket, to show what the project's own saves
- bubblewrap per call: a new box for each command, with the options that a slot's box has

and prints the median time of a call with one caller, and the calls per second with 1 and 8 callers, each in a slot of its own.
With `--full` also with 64 callers, and then: the memory of idle slots, whether many slots in one server slow a call down, and
how soon `true` answers beside a long command in the same batch. Needs bubblewrap.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import aiohttp
import yarl
from bench import (
    COMMAND,
    CallFailedError,
    Measurement,
    Moments,
    SlotServer,
    call_blocking,
    call_of,
    in_processes,
    repeat,
    repeat_async,
    slot_server,
    spawn,
)

from backends.client import SlotServerClient
from backends.codec import EncodedCall, Outcome
from backends.dispatch import Dispatcher
from sandbox_image.protocol import ExecuteRequest, ExecutionResult, ResetRequest

CALLERS = (1, 8)
MANY_CALLERS = 64
MANY_SLOTS = 256
ROUNDS = 8
LONG_COMMAND = "sleep 30"

Way = Callable[[int, float], list[Moments]]
"""Runs the command from a number of callers for some seconds."""

Call = Callable[[int], Awaitable[None]]
"""Runs the command once, as the caller of some number."""

Calling = Callable[[], AbstractAsyncContextManager[Call]]
"""Opens what is needed to call."""


def call_with_tasks(calling: Calling, callers: int, seconds: float) -> list[Moments]:
    """Call a slot server from as many tasks of this process as there are callers, each with its own slot."""

    async def run() -> list[Moments]:
        async with calling() as call:
            deadline = time.perf_counter() + seconds
            tasks = (repeat_async(partial(call, caller), deadline) for caller in range(callers))
            return await asyncio.gather(*tasks)

    return asyncio.run(run())


@asynccontextmanager
async def by_client(**where: Any) -> AsyncIterator[Call]:
    """Calls of the asynchronous client alone."""
    encoded = cache(call_of)
    async with SlotServerClient(**where) as client:
        yield lambda caller: succeed(client.execute(encoded(caller)))


@asynccontextmanager
async def by_dispatcher(unix_socket: Path) -> AsyncIterator[Call]:
    """Calls as a backend makes them."""
    names = itertools.count()
    async with SlotServerClient(unix_socket=unix_socket) as client:
        dispatcher = Dispatcher(client)

        def call(caller: int) -> Awaitable[None]:
            name = f"{time.monotonic_ns()}-{next(names)}"
            request = ExecuteRequest(f"slot_{caller}", "bash", {"command": "true"}, execution_id=name, timeout=30.0)
            return succeed(dispatcher.submit(request))

        yield call


@asynccontextmanager
async def by_aiohttp(unix_socket: Path) -> AsyncIterator[Call]:
    """Calls by aiohttp's client, which is told to leave out what is not needed."""
    encoded, url = cache(call_of), yarl.URL("http://slot-server/execute")
    async with aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(str(unix_socket), limit=0),
        headers={"Accept": "application/json", "Content-Type": "application/json"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
    ) as session:

        async def execute(caller: int) -> ExecutionResult:
            async with asyncio.timeout(45), session.post(url, data=encoded(caller).body, allow_redirects=False) as answer:
                return ExecutionResult.from_json(json.loads(await answer.read()))

        yield lambda caller: succeed(execute(caller))


async def succeed(call: Awaitable[ExecutionResult]) -> None:
    """Await a tool's result, which must be a success."""
    result = await call
    if not result.success:
        raise CallFailedError(str(result))


def ways_to_call(server: SlotServer, bubblewrap: tuple[str, ...]) -> dict[str, Way]:
    """All that is compared, by name."""

    def spawn_until(argv: tuple[str, ...], deadline: float) -> Moments:
        return repeat(lambda: spawn(argv), deadline)

    def socket_until(caller: int, deadline: float) -> Moments:
        return call_blocking(server, caller, deadline)

    return {
        "bare": lambda callers, share: in_processes(lambda _, end: spawn_until(COMMAND, end), callers, share),
        "server, socket": lambda callers, share: in_processes(socket_until, callers, share),
        "server, unix": partial(call_with_tasks, partial(by_client, unix_socket=server.unix_socket)),
        "server, tcp": partial(call_with_tasks, partial(by_client, url=f"http://127.0.0.1:{server.port}")),
        "server, dispatched": partial(call_with_tasks, partial(by_dispatcher, server.unix_socket)),
        "server, aiohttp": partial(call_with_tasks, partial(by_aiohttp, server.unix_socket)),
        "bubblewrap per call": lambda callers, share: in_processes(lambda _, end: spawn_until(bubblewrap, end), callers, share),
    }


def bubblewrap_command(directory: Path) -> tuple[str, ...]:
    """The command line of a box that runs one command."""
    program = shutil.which("bwrap")
    if program is None:
        sys.exit("bubblewrap is not installed")
    workspace = directory / "workspace"
    workspace.mkdir()
    links = [word for name in ("bin", "lib", "lib64") for word in ("--symlink", f"usr/{name}", f"/{name}")]
    closed = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr", *links]
    writable = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--bind", str(workspace), "/workspace"]
    return (program, *closed, *writable, "--remount-ro", "/", "--chdir", "/workspace", "--", *COMMAND)


def measure(directory: Path, callers: Sequence[int], seconds: float) -> dict[str, Measurement]:
    """Let every way have its turn, again and again."""
    with slot_server(directory / "server", max(callers)) as server:
        ways = ways_to_call(server, bubblewrap_command(directory))
        results = {name: Measurement() for name in ways}
        share = seconds / (ROUNDS * len(ways))
        for way in ways.values():
            way(max(callers), 0.1)
        for _ in range(ROUNDS):
            for count in callers:
                for name, way in ways.items():
                    results[name].add(way(count, share))
    return results


def table(results: dict[str, Measurement], callers: Sequence[int]) -> str:
    """The results, each beside the bare spawn."""
    bare = results["bare"]
    several = [count for count in callers if count > 1]
    head = "".join(f"{f'calls/s, {count}':>13}{'of bare':>9}" for count in several)
    rows = [f"{'':22}{'p50 ms':>9}{'x bare':>9}{'calls/s, 1':>13}{head}"]
    for name, result in results.items():
        rates = "".join(f"{result.rate(count):13.0f}{result.rate(count) / bare.rate(count):9.2f}" for count in several)
        rows.append(f"{name:22}{result.p50 * 1000:9.3f}{result.p50 / bare.p50:9.2f}{result.rate(1):13.0f}{rates}")
    return "\n".join(rows)


def idle_memory(directory: Path) -> str:
    """What idle slots hold: the proportional set size of all processes but the server itself."""
    with slot_server(directory / "idle", MANY_CALLERS) as server:
        call_with_tasks(partial(by_client, unix_socket=server.unix_socket), MANY_CALLERS, 0.1)
        boxes = sum(proportional_kib(process) for process in descendants(server.pid))
        own = proportional_kib(server.pid)
    return f"{MANY_CALLERS} idle slots: {boxes / MANY_CALLERS:.0f} KiB of PSS each, and {own / 1024:.1f} MiB for the server"


def proportional_kib(pid: int) -> int:
    """The memory of a process in KiB, what it shares with others divided among them (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


def crowding(directory: Path, seconds: float) -> str:
    """A call in a server with one slot beside the same call in a server with many."""
    results = {1: Measurement(), MANY_SLOTS: Measurement()}
    with ExitStack() as stack:
        servers = {slots: stack.enter_context(slot_server(directory / f"slots-{slots}", slots)) for slots in results}
        share = seconds / (2 * ROUNDS)
        for _ in range(ROUNDS):
            for slots, server in servers.items():
                results[slots].add([call_blocking(server, 0, time.perf_counter() + share)])
    one, many = results[1].p50 * 1000, results[MANY_SLOTS].p50 * 1000
    return f"p50 in a server of {MANY_SLOTS} slots: {many:.3f} ms, of 1 slot: {one:.3f} ms, ratio {many / one:.2f}"


async def beside_a_long_command(server: SlotServer) -> float:
    """Seconds until `true` has answered in a streamed batch whose other command goes on."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[float] = loop.create_future()

    def deliver(index: int, outcome: Outcome) -> None:
        if index == 1:
            answered.set_result(time.perf_counter())

    # Without names the client would not ask again for what a broken connection has lost.
    requests = [
        ExecuteRequest("slot_0", "bash", {"command": LONG_COMMAND}, execution_id=f"long {time.monotonic_ns()}"),
        ExecuteRequest("slot_1", "bash", {"command": "true"}, execution_id=f"short {time.monotonic_ns()}"),
    ]
    async with SlotServerClient(unix_socket=server.unix_socket) as client:
        start = time.perf_counter()
        batch = asyncio.create_task(client.execute_many([EncodedCall.of(request) for request in requests], deliver))
        taken = await answered - start
        if batch.done():
            raise CallFailedError("the long command did not last")
        await client.reset(ResetRequest("slot_0"))
        await batch
    return taken


def neighbours(directory: Path) -> str:
    """How soon a fast command answers that shares its batch with a slow one."""
    with slot_server(directory / "batch", 2) as server:
        times = [asyncio.run(beside_a_long_command(server)) * 1000 for _ in range(ROUNDS * 4)]
    return f"true beside `{LONG_COMMAND}` in one batch: p50 {statistics.median(times):.1f} ms, at most {max(times):.1f} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of callers")
    parser.add_argument(
        "--full", action="store_true", help="also 64 callers, memory, many slots, and a batch with a long command"
    )
    arguments = parser.parse_args()
    callers = (*CALLERS, MANY_CALLERS) if arguments.full else CALLERS
    with tempfile.TemporaryDirectory(prefix="tool-call-") as name:
        directory = Path(name)
        sys.stdout.write(table(measure(directory, callers, arguments.seconds), callers) + "\n")
        if arguments.full:
            crowded = crowding(directory, arguments.seconds / 2)
            sys.stdout.write("\n".join((idle_memory(directory), crowded, neighbours(directory))) + "\n")


if __name__ == "__main__":
    main()
