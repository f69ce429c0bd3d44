"""What the benchmarks share: callers, what they measure, and a slot server to call."""

from __future__ import annotations

import bisect
import itertools
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.codec import EncodedCall
from sandbox_image.protocol import ExecuteRequest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ("/bin/sh", "-c", "true")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
GATHER_TIMEOUT_S = 60.0
START_PAUSE_S = 0.05
"""Until all callers have heard that all are there; whoever began before would keep the others from the processors."""

Moments = list[float]
"""When a caller began and when each of its calls ended, in seconds: a call lasts from one moment to the next."""

Work = Callable[[int, float], Moments]
"""Calls over and over until a deadline, as the caller of some number."""


class BenchError(Exception):
    """Something cannot be measured, and why."""


class CallFailedError(BenchError):
    """A command that should have succeeded did not: the figures of its turn would mean nothing."""


class UnavailableError(BenchError):
    """Something that is to be measured cannot be had here."""


@dataclass
class Measurement:
    """All that was measured of one way to run a command: seconds per call with one caller, and calls per second."""

    alone: list[float] = field(default_factory=list)
    rates: dict[int, list[float]] = field(default_factory=dict)

    def add(self, callers: Sequence[Moments]) -> None:
        """Take in one turn."""
        self.rates.setdefault(len(callers), []).append(rate_of(callers))
        if len(callers) == 1:
            self.alone += [after - before for before, after in itertools.pairwise(callers[0])]

    @property
    def p50(self) -> float:
        """The median time of a call with one caller, in seconds."""
        return statistics.median(self.alone)

    def rate(self, callers: int) -> float:
        """Calls per second, the median over the turns."""
        return statistics.median(self.rates[callers])


def rate_of(callers: Sequence[Moments]) -> float:
    """Calls per second from when the first caller begins to when the first one stops.

    What the others finish after that does not count: the last one alone is faster than all together.
    """
    start, end = min(own[0] for own in callers), min(own[-1] for own in callers)
    return sum(calls_until(own, end) for own in callers) / (end - start)


def calls_until(own: Moments, moment: float) -> float:
    """How many calls of a caller had ended by then, the one under way by its part."""
    index = min(bisect.bisect_right(own, moment), len(own) - 1)
    return index - 1 + (moment - own[index - 1]) / (own[index] - own[index - 1]) if index else 0.0


def repeat(call: Callable[[], object], deadline: float) -> Moments:
    """Call until the deadline, at least once."""
    moments = [time.perf_counter()]
    while moments[-1] < deadline or len(moments) == 1:
        call()
        moments.append(time.perf_counter())
    return moments


async def repeat_async(call: Callable[[], Awaitable[object]], deadline: float) -> Moments:
    """As `repeat`, for a coroutine function."""
    moments = [time.perf_counter()]
    while moments[-1] < deadline or len(moments) == 1:
        await call()
        moments.append(time.perf_counter())
    return moments


def spawn(argv: tuple[str, ...], environment: Mapping[str, str] = ENVIRONMENT) -> None:
    """Run a program and wait for it, with nothing around it."""
    _, status = os.waitpid(os.posix_spawn(argv[0], argv, environment), 0)
    if status != 0:
        raise CallFailedError(f"{' '.join(argv)} ended with wait status {status}")


def in_processes(work: Work, callers: int, seconds: float) -> list[Moments]:
    """Let each caller work for some seconds in a process of its own: no interpreter lock stands between them.

    Raises:
        CallFailedError: as the first caller that failed did.
    """
    if callers == 1:
        return [work(0, time.perf_counter() + seconds)]
    context = multiprocessing.get_context("fork")
    start = context.Value("d")

    def set_start() -> None:
        start.value = time.perf_counter() + START_PAUSE_S

    gathered = context.Barrier(callers, set_start, GATHER_TIMEOUT_S)

    def run(caller: int, answer: Connection) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        gathered.wait()
        time.sleep(max(0.0, start.value - time.perf_counter()))
        try:
            answer.send(work(caller, start.value + seconds))
        except CallFailedError as error:
            answer.send(error)

    workers, answers = [], []
    try:
        for caller in range(callers):
            answer, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=run, args=(caller, theirs))
            worker.start()
            theirs.close()
            workers.append(worker)
            answers.append(answer)
        return [moments_of(answer.recv()) for answer in answers]
    except EOFError:
        raise CallFailedError("a caller died, see above") from None
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def moments_of(answer: Moments | CallFailedError) -> Moments:
    """What a caller has measured; or what it failed of is raised here."""
    if isinstance(answer, CallFailedError):
        raise answer
    return answer


@dataclass(frozen=True)
class SlotServer:
    """A slot server that runs: its process, its port on the loopback and its unix socket."""

    pid: int
    port: int
    unix_socket: Path


@contextmanager
def slot_server(directory: Path, slots: int) -> Iterator[SlotServer]:
    """A slot server with everything of its own in `directory`."""
    directory.mkdir()
    unix_socket = directory / "socket"
    command = [sys.executable, "-m", "sandbox_image.server", "--die-with-parent", "--slots", str(slots), "--port", "0"]
    command += ["--unix-socket", str(unix_socket), "--data-dir", str(directory / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise UnavailableError("the slot server did not start")
            yield SlotServer(process.pid, json.loads(line)["port"], unix_socket)
        finally:
            # Leaving the block would not wait if it is a Ctrl-C that ends it.
            process.terminate()
            process.wait()


def call_of(slot: int) -> EncodedCall:
    """The call of `true` in a slot."""
    return EncodedCall.of(ExecuteRequest(f"slot_{slot}", "bash", {"command": "true"}, timeout=30.0))


class PlainClient:
    """The HTTP API over a blocking socket, without any library: the least that a caller can spend."""

    def __init__(self, unix_socket: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(unix_socket))

    def __enter__(self) -> PlainClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def post(self, route: str, body: bytes) -> Any:
        """Send a message; the answer's JSON value."""
        self._socket.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (route.encode(), len(body), body)
        )
        head, _, payload = self._socket.recv(65536).partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(payload) < length:
            payload += self._socket.recv(65536)
        return json.loads(payload)

    def call(self, body: bytes) -> None:
        """Run a tool that succeeds."""
        outcome = self.post("/execute", body)
        if not outcome.get("success"):
            raise CallFailedError(str(outcome))


def call_blocking(server: SlotServer, caller: int, deadline: float) -> Moments:
    """Call `true` in the slot of a caller over and over, through `PlainClient`."""
    body = call_of(caller).body
    with PlainClient(server.unix_socket) as client:
        return repeat(lambda: client.call(body), deadline)
