"""The `tmux` tool: a terminal in a box, for programs that need one.

A tmux server runs in the box with one session of one window of one pane. A control-mode client stays connected to it: what the
pane is given to show is recorded as it comes, and an action costs no process. Beside them a small loop in the box answers what
the pane's shell is doing at the moment. All three, and what runs in the terminal, are one kept command.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from sandbox_image.box import Box, Kept
from sandbox_image.errors import ToolError
from sandbox_image.protocol import MAX_OUTPUT_BYTES, MAX_TIMEOUT_S, ExecutionResult, ProtocolError, Range, Wire
from sandbox_image.recording import Recording
from sandbox_image.shell import OutputBuffer, relative_to_workspace, variables_of
from sandbox_image.tmux_control import ControlClient, LineReader
from sandbox_image.tmux_keys import is_key_name

MAX_KEYS_BYTES = 1_000_000
MAX_WIDTH, MAX_HEIGHT = 1000, 500
DEFAULT_WIDTH, DEFAULT_HEIGHT = 80, 24
HISTORY_LINES = 2000
START_TIMEOUT_S = 10.0
_KEYS_AT_ONCE = 2000
_POLL_S = 0.02
_POLLS_AT_REST = 3
_WAKE_S = 0.3
"""How long a shell may take to notice that it was given something."""
_NO_TMUX = 69
_SHELL = """\
unset TMUX TMUX_PANE
command -v bash >/dev/null && PS1='\\w\\$ ' exec bash --norc --noprofile
PS1='$ ' exec sh -i
"""
_START = """\
command -v tmux >/dev/null || exit {no_tmux}
folder=$(mktemp -d) || exit 1
TERM=screen
for place in /usr/share/terminfo /usr/lib/terminfo /lib/terminfo; do
    [ -e "$place/t/tmux-256color" ] && TERM=tmux-256color
done
(exec 3<&- 4>&-; exec tmux -D -S "$folder/socket" -f /dev/null </dev/null >/dev/null) &
until [ -S "$folder/socket" ]; do
    kill -0 $! || exit 1
    sleep 0.01
done
(
    exec <&3 >&4 3<&- 4>&-
    exec tmux -u -C -S "$folder/socket" set -g default-terminal "$TERM" \\; set -g status off \\; \\
        set -g history-limit {history} \\; set -g automatic-rename off \\; \\
        set -g allow-rename off \\; new-session -x {width} -y {height} {shell}
) &
exec 3<&- 4>&-
while read -r pid; do
    if [ "$pid" = forget ]; then rm -r "$folder"; continue; fi
    switches= line=
    read -r line <"/proc/$pid/stat" && while read -r name value; do
        [ "$name" = voluntary_ctxt_switches: ] && switches=$value
    done <"/proc/$pid/status"
    set -- ${{line##*) }}
    echo "${{1-gone}} ${{3-0}} ${{6-0}} ${{switches:-0}}"
done
"""


@dataclass(frozen=True)
class TmuxArguments(Wire):
    """What `tmux` takes.

    `start`: `pane_width`, `pane_height`; `cwd` and `env` as `bash`. `resize`: `pane_width`, `pane_height`.
    `send_keys`: `keys` are names of keys or else text, with `literal` text only; then it waits for `min_wait_s`, and with
    `block` on until the shell waits for input again, `max_wait_s` at most. `capture`: with `history` what has scrolled away as
    well. `stream`: what was recorded since the last time, with `reset` from the beginning, `max_bytes` of it but one event at
    least.
    """

    action: Literal["start", "send_keys", "capture", "stream", "resize", "stop"]
    keys: list[str] | str | None = None
    literal: bool = False
    block: bool = False
    min_wait_s: Annotated[float, Range(0, MAX_TIMEOUT_S)] = 0.1
    max_wait_s: Annotated[float, Range(0, MAX_TIMEOUT_S)] = 30.0
    history: bool = False
    max_bytes: Annotated[int, Range(1, MAX_OUTPUT_BYTES)] = 100_000
    reset: bool = False
    pane_width: Annotated[int | None, Range(2, MAX_WIDTH)] = None
    pane_height: Annotated[int | None, Range(2, MAX_HEIGHT)] = None
    cwd: str | None = None
    env: dict[str, str] | None = None

    @property
    def texts(self) -> list[str]:
        """The keys as a list."""
        return [self.keys] if isinstance(self.keys, str) else self.keys or []

    def check(self) -> None:
        """Refuse what no caller should send.

        Raises:
            ProtocolError: a key is not a string.
        """
        if not all(isinstance(text, str) for text in self.texts):
            raise ProtocolError("field 'keys' must be a string or a list of strings")


@dataclass(frozen=True)
class _Shown:
    """What the terminal shows."""

    lines: list[bytes]
    width: int
    height: int
    cursor: tuple[int, int]
    alternate: bool


@dataclass(frozen=True)
class _Activity:
    """What the pane's shell does. `switches` counts how often it has gone to sleep."""

    state: str
    in_front: bool
    switches: int


class Tmux:
    """The terminal of a slot, and the recording of all that it has shown."""

    def __init__(self, box: Box, *, sandboxed: bool) -> None:
        self.recording = Recording()
        self._box = box
        self._sandboxed = sandboxed
        self._pane: _Pane | None = None

    async def execute(self, arguments: TmuxArguments, timeout_s: float) -> ExecutionResult:
        """Do one action.

        Raises:
            ToolError: it cannot be done; the text says why.
            BoxError: the box died.
        """
        start = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                output, truncated, metadata = await self._act(arguments, start + timeout_s)
        except TimeoutError:
            raise ToolError(f"timed out after {timeout_s:g} s; the terminal goes on") from None
        metadata |= {"action": arguments.action, "truncated": truncated, "sandboxed": self._sandboxed}
        metadata["duration_s"] = round(time.monotonic() - start, 6)
        return ExecutionResult(success=True, output=output, metadata=metadata)

    def close(self) -> None:
        """Let go of the terminal; what is in the box is killed."""
        pane, self._pane = self._pane, None
        if pane is not None:
            pane.close()

    async def _act(self, arguments: TmuxArguments, deadline: float) -> tuple[str, bool, dict[str, Any]]:
        # What a model can get wrong is for it to read.
        if arguments.action == "send_keys" and not arguments.texts:
            raise ToolError("`send_keys` needs `keys`")
        if arguments.action == "resize" and arguments.pane_width is None and arguments.pane_height is None:
            raise ToolError("`resize` needs `pane_width`, `pane_height` or both")
        if arguments.action == "stream":
            return self._stream(arguments)
        if arguments.action == "stop":
            return await self._stop()
        if arguments.action == "start":
            await self._start(arguments)
        pane = self._require_pane()
        try:
            return await self._use(pane, arguments, deadline)
        finally:
            if not pane.alive:
                self.close()

    async def _use(self, pane: _Pane, arguments: TmuxArguments, deadline: float) -> tuple[str, bool, dict[str, Any]]:
        waited: dict[str, Any] = {}
        if arguments.action == "send_keys":
            # Some room for what is to be done after the wait.
            waited = await pane.send_keys(arguments, deadline - 0.2)
            if not pane.alive:
                return "", False, {"terminal_ended": True, **waited}
        elif arguments.action == "resize":
            await pane.resize(arguments.pane_width, arguments.pane_height)
        shown = await pane.capture(history=arguments.history and arguments.action == "capture")
        buffer = OutputBuffer(MAX_OUTPUT_BYTES)
        buffer.write(b"\n".join(shown.lines).rstrip(b"\n "))
        return (
            buffer.text(),
            buffer.truncated,
            {
                "pane_width": shown.width,
                "pane_height": shown.height,
                "cursor": list(shown.cursor),
                "alternate_screen": shown.alternate,
                **waited,
            },
        )

    async def _start(self, arguments: TmuxArguments) -> None:
        if self._pane is not None and self._pane.alive:
            raise ToolError("the terminal is running already; use it, or `stop` it first")
        self.close()
        self._pane = await _Pane.start(self._box, self.recording, arguments)

    async def _stop(self) -> tuple[str, bool, dict[str, Any]]:
        if self._pane is not None:
            pane, self._pane = self._pane, None
            await pane.stop()
        return "", False, {}

    def _stream(self, arguments: TmuxArguments) -> tuple[str, bool, dict[str, Any]]:
        lines, more = self.recording.next_lines(arguments.max_bytes, from_start=arguments.reset)
        metadata = {"events": len(lines), "more": more, "recording_full": self.recording.full}
        return b"".join(lines).decode(), False, metadata

    def _require_pane(self) -> _Pane:
        if self._pane is None:
            raise ToolError("there is no terminal; `start` one first")
        return self._pane


class _Pane:
    """One life of a terminal."""

    def __init__(self, recording: Recording, commands: int, events: int, requests: int, replies: int) -> None:
        self._kept: Kept | None = None
        self._recording = recording
        self._requests = requests
        self._answers: deque[asyncio.Future[_Activity]] = deque()
        self._replies = LineReader(replies, self._on_activity, self._on_watch_end)
        self._client = ControlClient(commands, events, self._on_output, recording.resize)
        self._pid = 0

    @classmethod
    async def start(cls, box: Box, recording: Recording, arguments: TmuxArguments) -> Self:
        """Start a terminal and wait for the prompt of its shell.

        Raises:
            ToolError: there is no tmux, or it does not start.
            BoxError: the box died.
        """
        width, height = arguments.pane_width or DEFAULT_WIDTH, arguments.pane_height or DEFAULT_HEIGHT
        cwd, variables = relative_to_workspace(arguments.cwd), variables_of(arguments.env)
        (requests_in, requests), (replies, replies_out) = os.pipe(), os.pipe()
        (commands_in, commands), (events, events_out) = os.pipe(), os.pipe()
        null = os.open("/dev/null", os.O_RDWR)
        pane = cls(recording, commands, events, requests, replies)
        recording.start(width, height, "tmux-256color")
        script = _START.format(no_tmux=_NO_TMUX, history=HISTORY_LINES, width=width, height=height, shell=shlex.quote(_SHELL))
        theirs = [requests_in, replies_out, null, commands_in, events_out]
        try:
            try:
                pane._kept = await box.keep(script.encode(), theirs, cwd=cwd, variables=variables)
            finally:
                for descriptor in theirs:
                    os.close(descriptor)
            await pane._greet(pane._kept.ended)
        except BaseException:
            pane.close()
            raise
        return pane

    @property
    def alive(self) -> bool:
        """Whether its shell is there."""
        return not self._client.ended.is_set() and self._kept is not None and not self._kept.ended.done()

    async def send_keys(self, arguments: TmuxArguments, deadline: float) -> dict[str, Any]:
        """Type, and wait as asked for; what became of the wait, for the result.

        Raises:
            ToolError: the text is no text, or the terminal ended before it was typed.
        """
        commands = [command for text in arguments.texts for command in _commands_for(text, literal=arguments.literal)]
        before = await self._look()
        for command in commands:
            await self._client.ask(command)
        start = time.monotonic()
        await asyncio.sleep(min(arguments.min_wait_s, max(deadline - start, 0)))
        if not arguments.block:
            return {"timeout": False}
        at_rest = await self._rest(before, start, min(start + arguments.max_wait_s, deadline))
        return {"timeout": not at_rest and self.alive}

    async def resize(self, width: int | None, height: int | None) -> None:
        """Give it another size; None keeps the one it has.

        Raises:
            ToolError: tmux refuses it, or has ended.
        """
        sizes = ((f"-x {width} " if width else ""), (f"-y {height}" if height else ""))
        await self._client.ask(f"resize-window -t @0 {''.join(sizes)}")

    async def capture(self, *, history: bool) -> _Shown:
        """What it shows, without the blanks at the end of lines.

        Raises:
            ToolError: tmux has ended.
        """
        count = "#{e|+|:#{history_size},#{pane_height}}" if history else "#{pane_height}"
        facts = f"{count} #{{pane_width}} #{{pane_height}} #{{cursor_x}} #{{cursor_y}} #{{alternate_on}}"
        range_ = "-S - " if history else ""
        (first, *_), lines = await self._client.ask(f"display-message -p '{facts}' ; capture-pane -p {range_}-t %0", blocks=2)
        _, width, height, x, y, alternate = map(int, first.split())
        return _Shown(lines, width, height, (x, y), bool(alternate))

    async def stop(self) -> None:
        """Kill it, and wait until it is gone.

        Raises:
            BoxError: the box died.
        """
        kept = self._kept
        self.close()
        if kept is not None:
            await kept.ended

    def close(self) -> None:
        """Kill it and let go of everything."""
        if self._kept is not None and not self._kept.ended.done():
            self._kept.kill()
        self._client.close()
        self._replies.close()
        self._on_watch_end()
        os.close(self._requests)

    async def _greet(self, ended: asyncio.Future[int]) -> None:
        """Wait until the shell waits for input.

        Raises:
            ToolError: it does not come to that.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                try:
                    self._pid = int((await self._client.ask("display-message -p '#{pane_pid}'"))[0][0])
                except ToolError:
                    # Why is known better by what has just ended, if something has.
                    await asyncio.wait([ended], timeout=_WAKE_S)
                    if ended.done():
                        raise ToolError(_explain(ended.result())) from None
                    raise
                # tmux 3.3 crashes if this is set before there is a window.
                await self._client.ask("set-option -g window-size manual")
                # The socket has served; nobody else is to connect.
                self._request(b"forget")
                await self._rest(_Activity("", False, 0), time.monotonic(), time.monotonic() + START_TIMEOUT_S)
        except TimeoutError:
            raise ToolError(f"tmux did not start within {START_TIMEOUT_S:g} s") from None

    async def _rest(self, before: _Activity, since: float, deadline: float) -> bool:
        """Wait until the shell is in front and sleeps, after it has woken up for what it was sent; whether it did in time."""
        last, calm = before, 0
        while self.alive and time.monotonic() < deadline:
            now = await self._look()
            noticed = now.switches != before.switches or time.monotonic() - since > _WAKE_S
            calm = calm + 1 if now == last and noticed and now.in_front and now.state == "S" else 0
            if calm == _POLLS_AT_REST:
                return True
            last = now
            await asyncio.sleep(_POLL_S)
        return False

    async def _look(self) -> _Activity:
        answer: asyncio.Future[_Activity] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self._request(b"%d" % self._pid)
        return await answer

    def _request(self, line: bytes) -> None:
        try:
            os.write(self._requests, line + b"\n")
        except BrokenPipeError:
            self._on_watch_end()

    def _on_activity(self, line: bytes) -> None:
        fields = line.split()
        if len(fields) == 4 and all(field.lstrip(b"-").isdigit() for field in fields[1:]) and self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_result(_Activity(fields[0].decode(errors="replace"), fields[1] == fields[2], int(fields[3])))

    def _on_watch_end(self) -> None:
        while self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_result(_Activity("gone", False, 0))

    def _on_output(self, chunk: bytes) -> None:
        self._recording.output(chunk)


def _commands_for(text: str, *, literal: bool) -> list[str]:
    if not literal and is_key_name(text):
        quoted = f'"{text}"' if "'" in text else f"'{text}'"
        return [f"send-keys -t %0 -- {quoted}"]
    try:
        typed = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ToolError(f"keys: contain a lone surrogate at character {error.start}, which is not text") from error
    if len(typed) > MAX_KEYS_BYTES:
        raise ToolError(f"keys: more than {MAX_KEYS_BYTES} bytes; write a file instead")
    # Byte by byte in hexadecimal: nothing in it can mean anything to tmux.
    chunks = [typed[start : start + _KEYS_AT_ONCE] for start in range(0, len(typed), _KEYS_AT_ONCE)]
    return [f"send-keys -t %0 -H {chunk.hex(' ')}" for chunk in chunks]


def _explain(status: int) -> str:
    if status == _NO_TMUX:
        return (
            "tmux is not installed in this sandbox; install it where its /usr comes from (Debian, Ubuntu: apt-get install tmux)"
        )
    return f"tmux does not start in this sandbox (status {status})"
