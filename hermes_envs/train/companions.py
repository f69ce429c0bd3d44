"""The processes that a trainer may start beside itself: `run-api` and the environment."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from backends.teardown import finish
from hermes_envs.errors import ConfigError

STOP_TIMEOUT_S = 20.0
_SHOWN_CHARS = 2000


class Companions:
    """Child processes that belong together: one that fails is the end of the run, and leaving the block ends all of them.

    They end with this process, too, however it dies. What they say goes to a file each, in the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[Process] = []
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self.failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """How the first of them failed that did, in words."""
        self.finished: set[str] = set()
        """Those that ended with status 0."""

    async def __aenter__(self) -> Companions:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await finish(self.stop())

    async def stop(self) -> None:
        """End all of them, the last that was started first: it may need the others to end in order."""
        for watcher in self._watchers.values():
            watcher.cancel()
        while self._processes:
            await _stop(self._processes.pop())

    async def start(self, name: str, module: str, arguments: Sequence[str], *, may_finish: bool = False) -> None:
        """Start `python -m MODULE ARGUMENTS` under a name; one that `may_finish` has not failed if it ends with status 0."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}.log"
        with path.open("ab") as log:
            begin = log.tell()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "hermes_envs.train.child", str(os.getpid()), module, *arguments),
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for this process, which then ends the others in order.
                start_new_session=True,
            )
        self._processes.append(process)
        self._watchers[name] = asyncio.create_task(self._watch(name, process, path, begin, may_finish))

    async def ended(self, name: str) -> None:
        """Wait until the process of that name has ended, well or not."""
        await asyncio.wait({self._watchers[name]})

    async def _watch(self, name: str, process: Process, log: Path, begin: int, may_finish: bool) -> None:
        status = await process.wait()
        if status == 0 and may_finish:
            self.finished.add(name)
            return
        said = await asyncio.to_thread(_end_of, log, begin)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if not self.failure.done():
            self.failure.set_result(f"{name} {how}; the end of {log}:\n{said or 'nothing'}")


def _end_of(log: Path, begin: int) -> str:
    """The last of what was said from a byte on: before it stands what earlier runs said."""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace").strip()[-_SHOWN_CHARS:]


async def start_run_api(companions: Companions, url: str) -> None:
    """Start run-api at the address that the environment will ask.

    Raises:
        ConfigError: the address is not of this machine, or is in use.
    """
    address = urlsplit(url)
    if address.scheme != "http" or address.hostname not in ("localhost", "127.0.0.1") or address.path.strip("/"):
        raise ConfigError(f"env.rollout_server_url: run-api can be started at http://localhost:PORT only, not at {url}")
    port = address.port or 80
    check_free_port("env.rollout_server_url", "127.0.0.1", port)
    # Its own command would write a line for each of several requests a second.
    arguments = ["atroposlib.api:app", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    await companions.start("run-api", "uvicorn", arguments)


def check_free_port(field: str, host: str, port: int) -> None:
    """Raises: ConfigError: somebody listens there already, whom the environment would take for one of ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as reason:
            raise ConfigError(f"{field}: port {port} is in use: {reason.strerror}; end what listens there") from reason


async def _stop(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        pass
    # What it has left in its group, itself among it, had its time.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
