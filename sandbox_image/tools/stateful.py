"""The `bash_stateful` tool: commands in one shell that keeps its state from call to call.

The shell is interactive, so that neither an error nor SIGINT ends it, but has no terminal: it reads lines from a pipe. For each
call it gets two lines. The first runs the command, which is in a file, with its output to a pipe; the second reports the exit
status through another pipe. The output is never searched for markers.

The shell's parent holds the file and the pipes, and the shell opens them for each call under `/proc/$PPID/fd`: whatever a
command does to its own descriptors, the next one gets new ones. An output pipe is not used for another call before all
processes that hold it have ended: so the output of background jobs is not mixed with that of later calls.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any, Self

from sandbox_image import pieces
from sandbox_image.box.box import Box
from sandbox_image.box.commands import KeptCommand
from sandbox_image.errors import ToolError
from sandbox_image.protocol import ExecutionResult
from sandbox_image.tools.named_pipe import NamedPipe
from sandbox_image.tools.shell import BashArguments, OutputBuffer, encoded_command, relative_to_workspace, variables_of

INTERRUPT_GRACE_S = 1.0
"""How long to wait for the effect of each attempt to interrupt a command."""
MAX_BACKGROUND_BYTES = 20_000
"""The limit for the output of background jobs between two calls."""
# As many as fit below 10: every shell can close these descriptors.
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
# `\command` is neither an alias nor a function. A shell that has no descriptors left ends before the command runs.
_RUN = """\
\\command printf '%s began %s\\n' {token} "$$" </dev/null >"/proc/$PPID/fd/{status}" 2>"/proc/$PPID/fd/{output}" \
|| \\command exit 1; \
{restore}\\command . "/proc/$PPID/fd/{command}" </dev/null >"/proc/$PPID/fd/{output}" 2>&1
"""
_REPORT = """\
\\command printf '%s ended %s\\n' {token} "$?" >"/proc/$PPID/fd/{status}" || {otherwise}
"""
# Signals the descendants of the shell that were started since the call began, whatever their session or process group.
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
    """What `bash_stateful` takes. `cwd` and `env` are for a shell that is started; otherwise the shell keeps its own."""


@dataclass(frozen=True)
class _CallEnd:
    """How a call ended; `exit_code` is None if its time ran out, `began` is false if the command never ran."""

    exit_code: int | None
    began: bool = True
    shell_ended: bool = False


class StatefulShell:
    """The shell of a slot: starts with the first call, and is replaced when it has ended."""

    def __init__(self, box: Box, uid: int | None, *, sandboxed: bool) -> None:
        self._box = box
        self._uid = uid
        self._sandboxed = sandboxed
        self._session: _Session | None = None
        self._has_started = False

    async def execute(self, arguments: BashStatefulArguments, timeout_s: float) -> ExecutionResult:
        """Run a command; a failing command is an unsuccessful result. One call at a time.

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
                # Cancelled, for example: a command that nobody waits for must not go on.
                self.close()
                raise
            background = session.take_background()
            if session.over:
                self.close()
            # A shell can end between two calls, by TMOUT or a signal: the command has not run then, and is run in a new one.
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
        """Kill the shell and its descendants."""
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
    """One shell, from its start to its end."""

    def __init__(self, box: Box, uid: int | None) -> None:
        self._box = box
        self._input, self._lines = os.pipe()
        os.set_blocking(self._lines, False)
        self._command = os.memfd_create("command")
        # The slot's user can open it by name, but not for writing.
        os.fchmod(self._command, 0o444)
        self._status = NamedPipe(uid)
        self._outputs = [NamedPipe(uid) for _ in range(_OUTPUTS)]
        self._shell: KeptCommand | None = None
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
            session._shell = await box.keep(_START.encode(), given, cwd=cwd, variables=variables)
        except BaseException:
            session.close()
            raise
        finally:
            os.close(null)
        session._status.open(session._on_status)
        # Tested, because some shells drop the lines that they have read ahead when a command fails.
        session._say('[ -z "$BASH_VERSION" ] || set +o history\n')
        return session

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._shell is None or self._shell.ended.done()

    async def run(self, command: bytes, output: OutputBuffer, timeout_s: float) -> _CallEnd:
        """Run a command; when this returns, the output of its foreground processes is in `output`.

        Raises:
            BoxError: the box died.
        """
        os.ftruncate(self._command, 0)
        await pieces.fill(self._command, command)
        number = next((number for number, pipe in enumerate(self._outputs) if not pipe.in_use), 0)
        # If background jobs hold all pipes, this call shares one with such jobs.
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
        """The output of background jobs since the last time."""
        if self._background.total == 0:
            return ""
        text = self._background.text()
        # Not replaced: it is the sink of pipes.
        self._background.clear()
        return text

    def close(self) -> None:
        """Kill it, and close all descriptors."""
        if self._shell is not None and not self._shell.ended.done():
            self._shell.kill()
        for pipe in (self._status, *self._outputs):
            pipe.close()
        for descriptor in (self._command, self._input, self._lines):
            os.close(descriptor)

    async def _wait(self, timeout_s: float) -> _CallEnd:
        if not await self._settled(timeout_s):
            for attempt in (self._interrupt, self._interrupt_all, self._kill_all):
                await attempt()
                # Some shells drop the lines that they have read ahead when they are interrupted.
                self._say(_REPORT.format(token=self._token, status=_STATUS_FD, otherwise=":"))
                if await self._settled(INTERRUPT_GRACE_S):
                    break
            else:
                self._require_shell().kill()
                await self._require_shell().ended
            self._status.drain()
            self._last_exit_code = self._ended.result() if self._ended.done() else 0
            return _CallEnd(None, shell_ended=not self._ended.done())
        self._status.drain()
        if self._ended.done():
            self._last_exit_code = self._ended.result()
            return _CallEnd(self._last_exit_code)
        return _CallEnd(self._require_shell().ended.result(), began=self._shell_pid is not None, shell_ended=True)

    async def _settled(self, timeout_s: float) -> bool:
        """Wait for the end of the call or of the shell; whether one of them came in time."""
        shell = self._require_shell()
        done, _ = await asyncio.wait((self._ended, shell.ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if shell.ended in done and self._ended not in done:
            shell.ended.result()
        return bool(done)

    async def _interrupt(self) -> None:
        self._require_shell().interrupt()

    async def _interrupt_all(self) -> None:
        await self._signal_all("INT")

    async def _kill_all(self) -> None:
        await self._signal_all("KILL")

    async def _signal_all(self, signal: str) -> None:
        """Signal all processes that the call has started, whatever their process group, and then interrupt the shell."""
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
        self._require_shell().interrupt()

    def _require_shell(self) -> KeptCommand:
        if self._shell is None:
            raise ToolError("the shell is closed")
        return self._shell

    def _say(self, lines: str) -> None:
        try:
            os.write(self._lines, lines.encode())
        except BlockingIOError:
            # The shell has stopped reading: the call will time out.
            return

    def _on_status(self, chunk: bytes) -> None:
        *lines, self._heard = (self._heard + chunk).split(b"\n")
        # Reports are short lines; longer beginnings of lines need not be kept.
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
