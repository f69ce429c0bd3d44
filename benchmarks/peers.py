"""The ways that `compare.py` compares: one function each, which has a sandbox per caller ready while its block runs.

The peers' packages are imported where they are used, because they are installed into an environment that is made for the run.
They are used as their authors mean them to be, with logging to the terminal off.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import (
    COMMAND,
    CallFailedError,
    Moments,
    PlainClient,
    UnavailableError,
    Work,
    call_blocking,
    call_of,
    repeat,
    repeat_async,
    slot_server,
    spawn,
)
from docker_engine import DockerEngine, EngineApi, run

from backends.client import SlotServerClient
from backends.codec import encode
from sandbox_image.protocol import ResetRequest

if TYPE_CHECKING:
    from swerex.runtime.remote import RemoteRuntime

    RexCall = Callable[[RemoteRuntime, int], Awaitable[None]]

FEW, MANY = 8, 64
TOKEN = "compare"
QUIET = logging.getLogger("compare")
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Way:
    """One way to run `true` in a sandbox.

    `isolates` is what of the host the command cannot reach, `callers` the numbers of callers to measure it with. `fresh` makes
    a sandbox, runs `true` in it and throws it away: the seconds from the wish to the end of the command.
    """

    name: str
    isolates: str
    fresh: Callable[[], float]
    work: Work
    callers: Sequence[int] = (1, FEW)


def timed(call: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def bare_spawn() -> Iterator[list[Way]]:
    """What everything is compared with."""

    def work(caller: int, deadline: float) -> Moments:
        return repeat(lambda: spawn(COMMAND), deadline)

    yield [Way("bare posix_spawn", "nothing", lambda: timed(lambda: spawn(COMMAND)), work, (1, FEW, MANY))]


@contextmanager
def hermes_envs(directory: Path) -> Iterator[list[Way]]:
    """This project: a slot server on a unix socket, called without any library and by its own client."""
    everything = "files, processes, network"
    starts = iter(range(sys.maxsize))
    with slot_server(directory / "slots", MANY) as server:

        async def work(caller: int, deadline: float) -> Moments:
            call = call_of(caller)
            async with SlotServerClient(unix_socket=server.unix_socket) as client:

                async def execute() -> None:
                    result = await client.execute(call)
                    if not result.success:
                        raise CallFailedError(str(result))

                return await repeat_async(execute, deadline)

        async def fresh() -> float:
            async with SlotServerClient(unix_socket=server.unix_socket) as client:
                start = time.perf_counter()
                await client.reset(ResetRequest("slot_0"))
                await client.execute(call_of(0))
                return time.perf_counter() - start

        def fresh_blocking() -> float:
            with PlainClient(server.unix_socket) as client:
                reset, call = encode(ResetRequest("slot_0")), call_of(0).body
                start = time.perf_counter()
                client.post("/reset", reset)
                client.call(call)
                return time.perf_counter() - start

        def fresh_server() -> float:
            start = time.perf_counter()
            with slot_server(directory / f"slots-{next(starts)}", 1) as own:
                call_blocking(own, 0, 0.0)
                return time.perf_counter() - start

        callers = (1, FEW, MANY)
        blocking = functools.partial(call_blocking, server)
        yield [
            Way("hermes-envs, plain socket", everything, fresh_blocking, blocking, callers),
            Way("hermes-envs, its client", everything, lambda: asyncio.run(fresh()), in_loop(work), callers),
            Way("hermes-envs, server included", everything, fresh_server, blocking, ()),
        ]


def in_loop(work: Callable[[int, float], Any]) -> Work:
    """A coroutine function as what a caller does in a process of its own."""
    return lambda caller, deadline: asyncio.run(work(caller, deadline))


@contextmanager
def installed_peers(directory: Path) -> Iterator[Path]:
    """A virtual environment with the peers, importable here as well: it has the same interpreter.

    Raises:
        UnavailableError: pip cannot install them.
    """
    venv.create(directory)
    program = directory / "bin" / "python"
    listed = Path(__file__).with_name("peers.txt")
    run(sys.executable, "-m", "pip", "--python", program, "install", "--quiet", "--no-deps", "--requirement", listed)
    packages = run(program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    os.environ |= {
        "MSWEA_SILENT_STARTUP": "1",
        "MSWEA_GLOBAL_CONFIG_DIR": str(directory / "mini-swe-agent"),
        "SWE_REX_LOG_STREAM_LEVEL": "100",
    }
    sys.path.insert(0, packages)
    try:
        yield directory / "bin"
    finally:
        sys.path.remove(packages)


@contextmanager
def swe_rex_server(programs: Path) -> Iterator[RemoteRuntime]:
    """A SWE-ReX server, which is one sandbox there, and its client."""
    from swerex.runtime.remote import RemoteRuntime

    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    command = [str(programs / "swerex-remote"), "--host", "127.0.0.1", "--port", str(port), "--auth-token", TOKEN]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            runtime = RemoteRuntime(host="http://127.0.0.1", port=port, auth_token=TOKEN)
            try:
                asyncio.run(runtime.wait_until_alive())
            except TimeoutError as error:
                raise UnavailableError("a SWE-ReX server does not start") from error
            yield runtime
            asyncio.run(runtime.close())
        finally:
            process.terminate()
            process.wait()


@contextmanager
def swe_rex(programs: Path) -> Iterator[list[Way]]:
    """SWE-ReX: a server for each of 8 callers, shared by more; single commands, and commands in a shell that stays."""
    from swerex.exceptions import SwerexException
    from swerex.runtime.abstract import BashAction, Command, CreateBashSessionRequest

    command = Command(command=list(COMMAND), check=True)
    with ExitStack() as stack:
        runtimes = [stack.enter_context(swe_rex_server(programs)) for _ in range(FEW)]

        async def open_sessions(runtime: RemoteRuntime, callers: Sequence[int]) -> None:
            for caller in callers:
                await runtime.create_session(CreateBashSessionRequest(session=str(caller), startup_timeout=START_TIMEOUT_S))

        async def open_all() -> None:
            await asyncio.gather(*(open_sessions(runtimes[first], range(first, MANY, FEW)) for first in range(FEW)))

        async def execute(runtime: RemoteRuntime, caller: int) -> None:
            await runtime.execute(command)

        async def run_in_session(runtime: RemoteRuntime, caller: int) -> None:
            try:
                await runtime.run_in_session(BashAction(command="true", session=str(caller)))
            except SwerexException as error:
                # It gives its shell 0.1 s for a prompt, which a busy machine may not keep.
                raise CallFailedError(f"SWE-ReX: {error}") from error

        def work_of(call: RexCall) -> Work:
            async def work(caller: int, deadline: float) -> Moments:
                return await repeat_async(lambda: call(runtimes[caller % FEW], caller), deadline)

            return in_loop(work)

        def fresh() -> float:
            start = time.perf_counter()
            with swe_rex_server(programs) as runtime:
                asyncio.run(execute(runtime, 0))
                return time.perf_counter() - start

        def fresh_session() -> float:
            start = time.perf_counter()
            with swe_rex_server(programs) as runtime:
                asyncio.run(open_sessions(runtime, [0]))
                asyncio.run(run_in_session(runtime, 0))
                return time.perf_counter() - start

        asyncio.run(open_all())
        callers = (1, FEW, MANY)
        yield [
            Way("SWE-ReX execute", "nothing", fresh, work_of(execute), callers),
            Way("SWE-ReX run_in_session", "nothing", fresh_session, work_of(run_in_session), callers),
        ]


def succeed(environment: Any) -> None:
    """Run `true` in an environment of mini-swe-agent."""
    outcome = environment.execute({"command": "true"})
    if outcome["returncode"] != 0:
        raise CallFailedError(str(outcome))


@contextmanager
def mini_swe_bubblewrap(directory: Path) -> Iterator[list[Way]]:
    """mini-swe-agent's Bubblewrap environment: a new box for each command."""
    from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment

    if shutil.which("bwrap") is None:
        raise UnavailableError("bubblewrap is not installed")
    with ExitStack() as stack:
        # It makes its workspaces where temporary files are.
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = str(directory)

        def start() -> BubblewrapEnvironment:
            environment = BubblewrapEnvironment(logger=QUIET)
            stack.callback(environment.cleanup)
            return environment

        environments = [start() for _ in range(FEW)]

        def work(caller: int, deadline: float) -> Moments:
            return repeat(lambda: succeed(environments[caller]), deadline)

        yield [Way("mini-swe-agent Bubblewrap", "files", lambda: timed(lambda: succeed(start())), work)]


@contextmanager
def mini_swe_docker(engine: DockerEngine) -> Iterator[list[Way]]:
    """mini-swe-agent's Docker environment: a container for each caller, a `docker exec` for each command."""
    from minisweagent.environments.docker import DockerEnvironment

    def start() -> DockerEnvironment:
        try:
            return DockerEnvironment(logger=QUIET, image=engine.image, executable=engine.docker, run_args=engine.run_options)
        except subprocess.CalledProcessError as error:
            raise UnavailableError(error.stderr.strip()) from error

    def discard(environment: DockerEnvironment) -> None:
        # Its own way leaves `docker stop` in the background, which would run beside the next way for 10 s.
        if environment.container_id is not None:
            engine.remove(environment.container_id)
        environment.container_id = None

    def fresh() -> float:
        began = time.perf_counter()
        environment = start()
        try:
            succeed(environment)
            return time.perf_counter() - began
        finally:
            discard(environment)

    with ExitStack() as stack:
        environments = [start() for _ in range(FEW)]
        for environment in environments:
            stack.callback(discard, environment)

        def work(caller: int, deadline: float) -> Moments:
            return repeat(lambda: succeed(environments[caller]), deadline)

        yield [Way("mini-swe-agent Docker", "files, processes, network", fresh, work)]


@contextmanager
def docker_exec(engine: DockerEngine) -> Iterator[list[Way]]:
    """`docker exec` in a container for each caller, by the command line and by the engine's API."""
    containers = [engine.start() for _ in range(FEW)]

    def work_of(way: Callable[[], DockerEngine | EngineApi]) -> Work:
        def work(caller: int, deadline: float) -> Moments:
            client = way()
            return repeat(lambda: client.execute(containers[caller]), deadline)

        return work

    def fresh_of(way: Callable[[], DockerEngine | EngineApi]) -> Callable[[], float]:
        def fresh() -> float:
            began = time.perf_counter()
            client = way()
            container = client.start()
            try:
                client.execute(container)
                return time.perf_counter() - began
            finally:
                engine.remove(container)

        return fresh

    clients: dict[str, Callable[[], DockerEngine | EngineApi]] = {
        "docker exec": lambda: engine,
        "docker exec by the API": lambda: EngineApi(engine),
    }
    yield [Way(name, "files, processes, network", fresh_of(way), work_of(way)) for name, way in clients.items()]
