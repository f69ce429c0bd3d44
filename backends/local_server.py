"""A slot server as a child process of this one."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import sandbox_image
from backends.client import SlotServerClient
from backends.codec import shown
from backends.errors import BackendConfigError, SandboxUnavailableError
from backends.teardown import finish
from sandbox_image.protocol import VERSION
from sandbox_image.storage.datadir import DataDir

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0

_MAX_SOCKET_PATH = 107
_KEPT_CHARS = 4000
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")
_REMOVALS = 5
_PREFIX = "hermes-envs-"
_ABANDONED_AFTER_S = 60.0

_log = logging.getLogger(__name__)


class LocalServer:
    """A running slot server in a directory of its own, reached over a unix socket in it that only this user can open.

    The server makes the directory, and ends and removes it when its standard input ends: however this process dies, nothing
    stays behind.
    """

    def __init__(self, directory: Path, process: Process) -> None:
        self.directory = directory
        self._process = process
        self._said = ""
        self._listener = asyncio.create_task(self._listen())
        self.client = SlotServerClient(unix_socket=_socket(directory))

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @classmethod
    async def start(
        cls,
        *,
        slots: int,
        isolation: Literal["bubblewrap", "none"],
        parent: str | None,
        arguments: Sequence[str] = (),
        interpreter: Sequence[str] = (sys.executable,),
    ) -> LocalServer:
        """Start a server with a fresh directory below `parent` and wait until it is ready.

        `arguments` are further ones of its command line, which begins with `interpreter`.

        Raises:
            BackendConfigError: the server refuses to run here; the text is its own reason and remedy.
            SandboxUnavailableError: it does not get ready in time.
        """
        directory = _choose_directory(parent)
        try:
            process = await asyncio.create_subprocess_exec(
                # -P: nothing is imported from the current directory.
                *(*interpreter, "-P", "-m", "sandbox_image.server", "--die-with-parent"),
                *("--unix-socket", str(_socket(directory)), "--data-dir", str(directory)),
                *("--slots", str(slots), "--isolation", isolation, *arguments),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                cwd="/",
                env=_environment(),
                # Ctrl-C at the terminal is for this process, which then ends the server in order.
                start_new_session=True,
            )
        except BaseException:
            await finish(_remove(directory))
            raise
        server = cls(directory, process)
        try:
            await server._await_ready()
            await server._check(isolation)
        except BaseException:
            await finish(server.stop())
            raise
        return server

    async def wait(self) -> str:
        """Return when the process has ended: how it ended, in words."""
        status = await self._process.wait()
        return f"the slot server {f'was killed by signal {-status}' if status < 0 else f'ended with status {status}'}"

    async def stop(self) -> None:
        """End the server if it still runs, and remove what it left."""
        await self.client.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            _log.warning("the slot server %d does not end, killing it", self.pid)
            self._process.kill()
            await self._process.wait()
        self._listener.cancel()
        await asyncio.wait([self._listener])
        await _remove(self.directory)

    async def _await_ready(self) -> None:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await self._process.stdout.readline()
                if line:
                    return
                await self._process.wait()
                await asyncio.wait([self._listener])
        except TimeoutError:
            raise SandboxUnavailableError(
                f"the slot server was not ready within {START_TIMEOUT_S:g} s: {self._reason()}"
            ) from None
        raise BackendConfigError(f"the slot server cannot run here: {self._reason() or await self.wait()}")

    def _reason(self) -> str:
        """The last line that the server said: its own reason, or the end of a traceback."""
        return shown(next(reversed(self._said.strip().splitlines()), ""))

    async def _check(self, isolation: str) -> None:
        health = await self.client.health()
        if (health.version, health.isolation) != (VERSION, isolation):
            raise BackendConfigError(
                f"wanted a slot server of version {VERSION} with isolation {isolation},"
                f" got version {health.version} with isolation {shown(health.isolation)}"
            )

    async def _listen(self) -> None:
        """Keep the end of what the server says, and go on reading: a full pipe would stop it."""
        assert self._process.stderr is not None
        while said := await self._process.stderr.read(4096):
            text = said.decode(errors="replace")
            self._said = (self._said + text)[-_KEPT_CHARS:]
            _log.debug("slot server %d: %s", self.pid, text.rstrip())


def _socket(directory: Path) -> Path:
    return directory / "socket"


def remove_abandoned(parent: str | None) -> None:
    """Remove what runs have left that were killed together with their slot servers; nobody was there to do it."""
    for directory in _where(parent).glob(f"{_PREFIX}*"):
        try:
            found = directory.lstat()
            # A server that is just starting has not locked its directory yet.
            if found.st_uid == os.geteuid() and found.st_mtime < time.time() - _ABANDONED_AFTER_S:
                DataDir.remove_abandoned(directory)
        except OSError as error:
            _log.warning("%s cannot be removed: %s", directory, error)


def _where(parent: str | None) -> Path:
    return Path(parent or tempfile.gettempdir()).resolve()


def _choose_directory(parent: str | None) -> Path:
    """A path for the directory of one server, at which nothing is yet."""
    where = _where(parent)
    directory = where / f"{_PREFIX}{secrets.token_hex(6)}"
    if len(os.fsencode(_socket(directory))) > _MAX_SOCKET_PATH:
        raise BackendConfigError(
            f"local_data_dir: {where} is too long for a unix socket below it, which has {_MAX_SOCKET_PATH} bytes for its path"
        )
    return directory


def _environment() -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # A checkout that is not installed is found by its path alone.
    return {**passed_on, "PYTHONPATH": str(Path(sandbox_image.__path__[0]).parent)}


def _exists(directory: Path) -> bool:
    return os.path.lexists(directory)


async def _remove(directory: Path) -> None:
    # Usually the server has removed it. No thread to see that: there are none to be had while the interpreter exits.
    if not _exists(directory):
        return
    for attempt in range(_REMOVALS):
        try:
            await asyncio.to_thread(DataDir.remove, directory)
        except NotADirectoryError:
            # The server never got as far as making it.
            return
        except OSError as error:
            # Whatever was killed with the server may still be on its way out, and writing.
            reason = error
            await asyncio.sleep(0.1 * 2**attempt)
        else:
            return
    _log.warning("%s cannot be removed: %s", directory, reason)
