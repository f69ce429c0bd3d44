"""A terminal in a box: tmux, and a loop that watches the shell in it."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sandbox_image.box.box import Box
from sandbox_image.box.commands import KeptCommand
from sandbox_image.errors import ToolError
from sandbox_image.tools.recording import Recording
from sandbox_image.tools.tmux_control import ControlClient, LineReader

MAX_KEYS_BYTES = 1_000_000
HISTORY_LINES = 2000
START_TIMEOUT_S = 30.0
_KEYS_AT_ONCE = 2000
_POLL_S = 0.02
_POLLS_AT_REST = 3
_WAKE_S = 0.3
"""After so long, a shell that has not woken up for its input is taken to wait for more of it."""
_NO_TMUX = 69
# The names of keys that tmux knows (tmux(1), "KEY BINDINGS"); other texts are typed literally.
_NAMED_KEYS = (
    "F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 F11 F12 IC Insert DC Delete Home End NPage PageDown PgDn PPage PageUp PgUp Tab BTab Space "
    "BSpace Enter Escape Up Down Left Right KP/ KP* KP- KP7 KP8 KP9 KP+ KP4 KP5 KP6 KP1 KP2 KP3 KPEnter KP0 KP."
)
_KEY = re.compile(
    rf"(?:[CMS]-)*(?:{'|'.join(map(re.escape, _NAMED_KEYS.split()))})|(?:[CMS]-)+[!-~]|\^[@-~]", re.IGNORECASE | re.ASCII
)
_SHELL = """\
unset TMUX TMUX_PANE
command -v bash >/dev/null && PS1='\\w\\$ ' exec bash --norc --noprofile
PS1='$ ' exec sh -i
"""
_START = """\
command -v tmux >/dev/null || exit {no_tmux}
folder=$(mktemp -d) || exit 1
TERM=screen
for directory in /usr/share/terminfo /usr/lib/terminfo /lib/terminfo; do
    [ -e "$directory/t/tmux-256color" ] && TERM=tmux-256color
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
done 2>/dev/null
"""


@dataclass(frozen=True)
class Shown:
    """The screen of a terminal."""

    lines: list[bytes]
    width: int
    height: int
    cursor: tuple[int, int]
    alternate: bool


@dataclass(frozen=True)
class _Activity:
    """What the shell of the pane does; `switches` counts its voluntary context switches."""

    state: str
    in_front: bool
    switches: int


class Pane:
    """One terminal, from its start to its end."""

    def __init__(self, recording: Recording, commands: int, events: int, requests: int, replies: int) -> None:
        self._command: KeptCommand | None = None
        self._recording = recording
        self._requests = requests
        os.set_blocking(requests, False)
        self._answers: deque[asyncio.Future[_Activity]] = deque()
        self._replies = LineReader(replies, self._on_activity, self._on_watch_end)
        self._client = ControlClient(commands, events, self._on_output, recording.resize)
        self._pid = 0

    @classmethod
    async def start(
        cls, box: Box, recording: Recording, size: tuple[int, int], *, cwd: bytes, variables: Sequence[bytes]
    ) -> Self:
        """Start a terminal and wait for the prompt of its shell.

        Raises:
            ToolError: there is no tmux, or it does not start.
            BoxError: the box died.
        """
        width, height = size
        (requests_in, requests), (replies, replies_out) = os.pipe(), os.pipe()
        (commands_in, commands), (events, events_out) = os.pipe(), os.pipe()
        complaints = os.memfd_create("complaints")
        pane = cls(recording, commands, events, requests, replies)
        recording.start(width, height, "tmux-256color")
        script = _START.format(no_tmux=_NO_TMUX, history=HISTORY_LINES, width=width, height=height, shell=shlex.quote(_SHELL))
        theirs = [requests_in, replies_out, complaints, commands_in, events_out]
        try:
            try:
                pane._command = await box.keep(script.encode(), theirs, cwd=cwd, variables=variables)
            finally:
                for descriptor in theirs:
                    if descriptor != complaints:
                        os.close(descriptor)
            await pane._greet(pane._command.ended, complaints)
        except BaseException:
            pane.close()
            raise
        finally:
            os.close(complaints)
        return pane

    @property
    def alive(self) -> bool:
        """Whether its shell runs."""
        return not self._client.ended.is_set() and self._command is not None and not self._command.ended.done()

    async def send_keys(
        self, texts: Sequence[str], *, literal: bool, min_wait_s: float, until: float | None, end: float
    ) -> bool:
        """Type, wait for `min_wait_s` and then, with `until`, for the shell to wait for input; whether it did by then.

        Returns at `end` at the latest; both are times of `time.monotonic`.

        Raises:
            ToolError: the text cannot be encoded, or the terminal ended before it was typed.
        """
        commands = await asyncio.to_thread(_commands_for, texts, literal)
        before = await self._look()
        for command in commands:
            await self._client.ask(command)
        start = time.monotonic()
        await asyncio.sleep(min(min_wait_s, max(end - start, 0)))
        return until is None or await self._rest(before, start, min(until, end)) or not self.alive

    async def resize(self, width: int | None, height: int | None) -> None:
        """Change the size; None keeps the current one.

        Raises:
            ToolError: tmux refuses it, or has ended.
        """
        sizes = ((f"-x {width} " if width else ""), (f"-y {height}" if height else ""))
        await self._client.ask(f"resize-window -t @0 {''.join(sizes)}")

    async def capture(self, *, history: bool) -> Shown:
        """The screen, and with `history` what has scrolled away; without the blanks at the end of lines.

        Raises:
            ToolError: tmux has ended.
        """
        count = "#{e|+|:#{history_size},#{pane_height}}" if history else "#{pane_height}"
        facts = f"{count} #{{pane_width}} #{{pane_height}} #{{cursor_x}} #{{cursor_y}} #{{alternate_on}}"
        range_ = "-S - " if history else ""
        command = f"display-message -p -t %0 '{facts}' ; capture-pane -p {range_}-t %0"
        (_, width, height, x, y, alternate), lines = await self._client.ask_numbers(command, 6, blocks=2)
        return Shown(lines, width, height, (x, y), bool(alternate))

    async def stop(self) -> None:
        """Kill it, and wait for its end.

        Raises:
            BoxError: the box died.
        """
        command = self._command
        self.close()
        if command is not None:
            await command.ended

    def close(self) -> None:
        """Kill it, and close all descriptors."""
        if self._command is not None and not self._command.ended.done():
            self._command.kill()
        self._client.close()
        self._replies.close()
        self._on_watch_end()
        os.close(self._requests)

    async def _greet(self, ended: asyncio.Future[int], complaints: int) -> None:
        """Configure tmux, and wait until the shell waits for input.

        Raises:
            ToolError: tmux or the shell does not start.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                try:
                    await self._client.ready.wait()
                    (self._pid,), _ = await self._client.ask_numbers("display-message -p -t %0 '#{pane_pid}'", 1)
                except ToolError:
                    # The exit status of the kept command tells more.
                    await asyncio.wait([ended], timeout=_WAKE_S)
                    if ended.done():
                        raise ToolError(_explain(ended.result(), os.pread(complaints, 4096, 0))) from None
                    raise
                # tmux 3.3 crashes if this is set before there is a window.
                await self._client.ask("set-option -g window-size manual")
                # Removes the socket: no other client is to connect.
                self._request(b"forget")
                await self._rest(_Activity("", False, 0), time.monotonic(), time.monotonic() + START_TIMEOUT_S)
        except TimeoutError:
            raise ToolError(f"tmux did not start within {START_TIMEOUT_S:g} s") from None

    async def _rest(self, before: _Activity, since: float, deadline: float) -> bool:
        """Wait until the shell has woken up for its input, and then sleeps in the foreground; whether it did in time."""
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
        except (BrokenPipeError, BlockingIOError):
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


def _commands_for(texts: Sequence[str], literal: bool) -> list[str]:
    return [command for text in texts for command in _commands_of(text, literal)]


def _commands_of(text: str, literal: bool) -> list[str]:
    if not literal and is_key_name(text):
        quoted = f'"{text}"' if "'" in text else f"'{text}'"
        return [f"send-keys -t %0 -- {quoted}"]
    try:
        typed = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ToolError(f"keys: contain a lone surrogate at character {error.start}, which is not text") from error
    if len(typed) > MAX_KEYS_BYTES:
        raise ToolError(f"keys: more than {MAX_KEYS_BYTES} bytes; write a file instead")
    # In hexadecimal, so that tmux interprets nothing of it.
    chunks = [typed[start : start + _KEYS_AT_ONCE] for start in range(0, len(typed), _KEYS_AT_ONCE)]
    return [f"send-keys -t %0 -H {chunk.hex(' ')}" for chunk in chunks]


def _explain(status: int, complaint: bytes) -> str:
    if status == _NO_TMUX:
        return "tmux is not installed in this sandbox; install it where its /usr comes from (Debian: apt-get install tmux)"
    last = complaint.decode(errors="replace").strip().splitlines()[-1:]
    return ": ".join([f"tmux does not start in this sandbox (status {status})", *last])


def is_key_name(text: str) -> bool:
    """Whether tmux takes a text for a key: `Enter`, `C-c`, `M-x`, `S-Up`, `^d`, in upper or lower case."""
    return _KEY.fullmatch(text) is not None
