"""The `bash_stateful` tool: commands in one shell that keeps its state from call to call.

The shell is an interactive one without a terminal that reads lines from a pipe. For each call it gets two: one that runs the
command, which lies in a file, with the output going to a pipe, and one that reports the exit status through another pipe.
Nothing is looked for in the output. Because the shell is interactive, neither an error nor SIGINT ends it.

Its parent holds the file and the pipes, and the shell opens them anew for each call under `/proc/$PPID/fd`: whatever a command
does to its own descriptors, the next one has good ones. The pipe of a call is not used again before everybody who got it has
ended; what background jobs print after their call is told apart from the output of later calls by that.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any, Self

from sandbox_image import pieces
from sandbox_image.box.box import Box, KeptCommand
from sandbox_image.errors import ToolError
from sandbox_image.protocol import ExecutionResult
from sandbox_image.tools.pipes import NamedPipe
from sandbox_image.tools.shell import BashArguments, OutputBuffer, encoded_command, relative_to_workspace, variables_of

INTERRUPT_GRACE_S = 1.0
"""How long each attempt to interrupt a command may take."""
MAX_BACKGROUND_BYTES = 20_000
"""What is kept of the output of background jobs between two calls."""
# As many as fit below 10: the descriptors that every shell can close.
_OUTPUTS = 5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_COMMAND_FD, _STATUS_FD, _FIRST_OUTPUT_FD = 3, 4, 5
_CLOSED = " ".join(f"{number}<&-" for number in range(_COMMAND_FD, _FIRST_OUTPUT_FD + _OUTPUTS))
_START = f"""\
trap : INT
(
    exec {_CLOSED}
    command -v bash >/dev/null && exec bash --norc --noprofile --noediting -i
    exec sh -i
)
exit $?
"""
# `\command` is neither an alias nor a function of the user's. A shell without descriptors left ends before the command runs.
_RUN = """\
\\command printf '%s began %s\\n' {token} "$$" </dev/null >"/proc/$PPID/fd/{status}" 2>"/proc/$PPID/fd/{output}" \
|| \\command exit 1; \
{restore}\\command . "/proc/$PPID/fd/{command}" </dev/null >"/proc/$PPID/fd/{output}" 2>&1
"""
_REPORT = """\
\\command printf '%s ended %s\\n' {token} "$?" >"/proc/$PPID/fd/{status}" || {otherwise}
"""
# All that descends from the shell and has started since the call began, wherever it has gone.
_SIGNAL_CALL = """\
shell=$1 signal=$2 since=$3 below=" $1 " again=1
while [ "$again" ]; do
    again=
    for file in /proc/[0-9]*/stat; do
        read -r line <"$file" || continue
        pid=${line%% *}
        set -- ${line##*) }
        case $below in *" $pid "*) continue ;; *" $2 "*) ;; *) continue ;; esac
        below="$below$pid " again=1
        [ "${20}" -lt "$since" ] || kill -s "$signal" "$pid"
    done
done 2>/dev/null
"""


@dataclass(frozen=True)
class BashStatefulArguments(BashArguments):
    """What `bash_stateful` takes. `cwd` and `env` are what a shell starts with; later calls go on where the last one ended."""


@dataclass(frozen=True)
class _CallEnd:
    """`exit_code` is None where time ran out; `began` tells a command that never ran; the shell may have ended with it."""

    exit_code: int | None
    began: bool = True
    shell_ended: bool = False


class StatefulShell:
    """The shell of a slot, which starts with its first call and is replaced when it has ended."""

    def __init__(self, box: Box, uid: int | None, *, sandboxed: bool) -> None:
        self._box = box
        self._uid = uid
        self._sandboxed = sandboxed
        self._session: _Session | None = None
        self._has_started = False

    async def execute(self, arguments: BashStatefulArguments, timeout_s: float) -> ExecutionResult:
        """Run a command; a failing one is a result like any other. One at a time.

        Raises:
            ToolError: the command cannot be passed to a shell, or none can be started.
            BoxError: the box died.
        """
        command = await encoded_command(arguments.command)
        output = OutputBuffer(arguments.max_output_bytes)
        start = time.monotonic()
        restarted = False
        while True:
            if self._session is None:
                restarted = self._has_started
                self._session = await _Session.start(self._box, self._uid, arguments)
                self._has_started = True
            session = self._session
            try:
                end = await session.run(command, output, timeout_s)
            except BaseException:
                # Whatever interrupts the wait, a command that nobody waits for must not run on.
                self.close()
                raise
            background = session.take_background()
            if session.over:
                self.close()
            # A shell can end between two calls, by its own TMOUT or somebody's signal; the command has not run then.
            if end.began or restarted:
                break
        metadata = {
            "exit_code": end.exit_code,
            "timeout": end.exit_code is None,
            "truncated": output.truncated,
            "output_bytes": output.total,
            "duration_s": round(time.monotonic() - start, 6),
            "sandboxed": self._sandboxed,
            "shell_restarted": restarted,
            "shell_ended": end.shell_ended,
            "shell_replaced": end.shell_ended and end.exit_code is None,
        }
        return _result(end, timeout_s, output, metadata | ({"background_output": background} if background else {}))

    def close(self) -> None:
        """Let go of the shell; what is in the box is killed."""
        if self._session is not None:
            self._session.close()
            self._session = None


def _result(end: _CallEnd, timeout_s: float, output: OutputBuffer, metadata: dict[str, Any]) -> ExecutionResult:
    if not end.began:
        error: str | None = f"the shell ended at once, with status {end.exit_code}"
    elif end.exit_code is None and end.shell_ended:
        error = f"timed out after {timeout_s:g} s; the command could not be interrupted, so its shell was killed"
    elif end.exit_code is None:
        error = f"timed out after {timeout_s:g} s; the command was interrupted, the shell goes on"
    else:
        error = None if end.exit_code == 0 else f"exit status {end.exit_code}"
    return ExecutionResult(success=error is None, output=output.text(), error=error, metadata=metadata)


class _Session:
    """One life of a shell."""

    def __init__(self, box: Box, uid: int | None) -> None:
        self._box = box
        self._input, self._lines = os.pipe()
        os.set_blocking(self._lines, False)
        self._command = os.memfd_create("command")
        # Only ours to write: the slot's user may open it by name.
        os.fchmod(self._command, 0o444)
        self._status = NamedPipe(uid)
        self._outputs = [NamedPipe(uid) for _ in range(_OUTPUTS)]
        self._kept: KeptCommand | None = None
        self._background = OutputBuffer(MAX_BACKGROUND_BYTES)
        self._token = ""
        self._heard = b""
        self._shell_pid: int | None = None
        self._began_at = 0
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._last_exit_code = 0

    @classmethod
    async def start(cls, box: Box, uid: int | None, arguments: BashStatefulArguments) -> Self:
        """Start a shell.

        Raises:
            ToolError: it cannot be started.
            BoxError: the box died.
        """
        cwd = relative_to_workspace(arguments.cwd)
        variables = variables_of(arguments.env)
        session = cls(box, uid)
        null = os.open("/dev/null", os.O_RDWR)
        given = [session._input, null, null, session._command]
        given += [pipe.read_end for pipe in (session._status, *session._outputs)]
        try:
            session._kept = await box.keep(_START.encode(), given, cwd=cwd, variables=variables)
        except BaseException:
            session.close()
            raise
        finally:
            os.close(null)
        session._status.open(session._on_status)
        # An error would make some shells drop the lines that they have read ahead.
        session._say('[ -z "$BASH_VERSION" ] || set +o history\n')
        return session

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._kept is None or self._kept.ended.done()

    async def run(self, command: bytes, output: OutputBuffer, timeout_s: float) -> _CallEnd:
        """Run a command; when this returns all that its foreground printed is in `output`.

        Raises:
            BoxError: the box died.
        """
        os.ftruncate(self._command, 0)
        await pieces.fill(self._command, command)
        number = next((number for number, pipe in enumerate(self._outputs) if not pipe.in_use), 0)
        # If as many calls as there are pipes have left jobs behind that hold theirs, some of those share a pipe with this call.
        pipe = self._outputs[number]
        pipe.open(output.write)
        self._token, self._shell_pid = secrets.token_hex(8), None
        self._began_at = int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)
        self._ended = asyncio.get_running_loop().create_future()
        restore = f"(\\command exit {self._last_exit_code}) || " if self._last_exit_code else ""
        names = {"token": self._token, "status": _STATUS_FD, "command": _COMMAND_FD, "output": _FIRST_OUTPUT_FD + number}
        self._say(_RUN.format(**names, restore=restore) + _REPORT.format(**names, otherwise="\\command exit 1"))
        end = await self._wait(timeout_s)
        pipe.drain()
        pipe.leave(self._background.write)
        return end

    def take_background(self) -> str:
        """What background jobs have printed after their calls, since this was last asked."""
        if self._background.total == 0:
            return ""
        text = self._background.text()
        # The pipes keep writing to the same object.
        self._background.clear()
        return text

    def close(self) -> None:
        """Kill it and let go of everything."""
        if self._kept is not None and not self._kept.ended.done():
            self._kept.kill()
        for pipe in (self._status, *self._outputs):
            pipe.close()
        for descriptor in (self._command, self._input, self._lines):
            os.close(descriptor)

    async def _wait(self, timeout_s: float) -> _CallEnd:
        if not await self._settled(timeout_s):
            for attempt in (self._interrupt, self._interrupt_all, self._kill_all):
                await attempt()
                # Not every shell keeps the lines that it had read ahead when it is interrupted.
                self._say(_REPORT.format(token=self._token, status=_STATUS_FD, otherwise=":"))
                if await self._settled(INTERRUPT_GRACE_S):
                    break
            else:
                self._require_kept().kill()
                await self._require_kept().ended
            self._status.drain()
            self._last_exit_code = self._ended.result() if self._ended.done() else 0
            return _CallEnd(None, shell_ended=not self._ended.done())
        self._status.drain()
        if self._ended.done():
            self._last_exit_code = self._ended.result()
            return _CallEnd(self._last_exit_code)
        return _CallEnd(self._require_kept().ended.result(), began=self._shell_pid is not None, shell_ended=True)

    async def _settled(self, timeout_s: float) -> bool:
        """Whether the call or the shell ends within some seconds."""
        kept = self._require_kept()
        done, _ = await asyncio.wait((self._ended, kept.ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if kept.ended in done and self._ended not in done:
            kept.ended.result()
        return bool(done)

    async def _interrupt(self) -> None:
        self._require_kept().interrupt()

    async def _interrupt_all(self) -> None:
        await self._signal_all("INT")

    async def _kill_all(self) -> None:
        await self._signal_all("KILL")

    async def _signal_all(self, signal: str) -> None:
        """Signal everything that the call has started, and then the shell; one in another process group was out of reach."""
        if self._shell_pid is None:
            return
        null = os.open("/dev/null", os.O_RDWR)
        try:
            script = f"set -- {self._shell_pid} {signal} {self._began_at}\n{_SIGNAL_CALL}"
            helper = await self._box.keep(script.encode(), [null, null, null])
        finally:
            os.close(null)
        await asyncio.wait([helper.ended], timeout=INTERRUPT_GRACE_S)
        if not helper.ended.done():
            helper.kill()
        self._require_kept().interrupt()

    def _require_kept(self) -> KeptCommand:
        if self._kept is None:
            raise ToolError("the shell is closed")
        return self._kept

    def _say(self, lines: str) -> None:
        try:
            os.write(self._lines, lines.encode())
        except BlockingIOError:
            # It does not read any more, which a timeout will show.
            return

    def _on_status(self, chunk: bytes) -> None:
        *lines, self._heard = (self._heard + chunk).split(b"\n")
        # Only the shell's own reports are short lines; nothing else needs to be remembered.
        self._heard = self._heard[-100:]
        prefix = f"{self._token} ".encode()
        for line in lines:
            if not line.startswith(prefix):
                continue
            match line.removeprefix(prefix).split():
                case [b"began", pid] if pid.isdigit():
                    self._shell_pid = int(pid)
                case [b"ended", code] if code.isdigit() and not self._ended.done():
                    self._ended.set_result(int(code))
