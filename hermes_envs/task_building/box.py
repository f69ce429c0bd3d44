"""A bubblewrap box for code that nobody has read: no network, no files but those that it is given."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.teardown import finish
from hermes_envs.errors import TaskBuildError

_SYSTEM_FILES = ("ld.so.cache", "passwd", "group", "nsswitch.conf", "localtime", "mime.types", "alternatives")
_OUTPUT_TAIL_BYTES = 4000


@dataclass(frozen=True)
class BoxResult:
    """How a command ended; `exit_code` is None if it was killed for taking too long. `output` is the end of what it wrote."""

    exit_code: int | None
    output: str


@dataclass(frozen=True)
class Box:
    """Starts commands with their own namespaces; `writable` and `readable` map paths inside to directories outside.

    The interpreter that runs this program, and whatever the system has in /usr, can be used inside.
    """

    writable: Mapping[str, Path]
    readable: Mapping[str, Path]

    async def run(
        self, command: Sequence[str], *, cwd: str, timeout_s: float, env: Mapping[str, str] | None = None
    ) -> BoxResult:
        """Run a command to its end or its time limit; nothing that it started survives.

        Raises:
            TaskBuildError: bubblewrap is not installed.
        """
        process = await asyncio.create_subprocess_exec(
            *self._arguments(cwd, env or {}),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        assert process.stdout is not None
        reading = asyncio.create_task(_tail(process.stdout))
        try:
            exit_code = await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            exit_code = None
        finally:
            # Bubblewrap's death takes everything in the box with it; that is done when nobody is left who could write.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            output = await finish(reading)
            await finish(process.wait())
        return BoxResult(exit_code, output.decode(errors="replace"))

    def _arguments(self, cwd: str, env: Mapping[str, str]) -> list[str]:
        program = shutil.which("bwrap")
        if program is None:
            raise TaskBuildError("bubblewrap is not installed: apt-get install bubblewrap")
        arguments = [program, "--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--die-with-parent"]
        arguments += ["--new-session", "--cap-drop", "ALL", "--clearenv"]
        defaults = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        for name, value in {**defaults, **env}.items():
            arguments += ["--setenv", name, value]
        arguments += _system_mounts()
        arguments += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
        for inside, outside in self.readable.items():
            arguments += ["--ro-bind", str(outside), inside]
        for inside, outside in self.writable.items():
            arguments += ["--bind", str(outside), inside]
        return [*arguments, "--chdir", cwd, "--"]


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """Read to the end and keep the last bytes."""
    kept = b""
    while chunk := await stream.read(65536):
        kept = (kept + chunk)[-_OUTPUT_TAIL_BYTES:]
    return kept


def _system_mounts() -> list[str]:
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/") / name
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    for name in _SYSTEM_FILES:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    if not sys.base_prefix.startswith("/usr"):
        arguments += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    return arguments
