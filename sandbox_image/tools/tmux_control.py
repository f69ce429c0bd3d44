"""A client of tmux's control mode (tmux(1), "CONTROL MODE"): commands, their answers, and the output of the pane.

tmux answers each command with a block of lines between `%begin` and `%end` or `%error`; `%output` and other notifications come
between blocks. The text on the screen can look like any of these lines. The number of lines of such an answer is therefore
asked for first, and only a line after so many can end the block.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sandbox_image.errors import ToolError

_READ_BYTES = 65536
_LONGEST_LINE = 1 << 18
_LONGEST_ANSWER = 16 << 20
_ESCAPED = re.compile(rb"\\([0-7]{3})")
_LAYOUT = re.compile(rb"%layout-change @\d+ [0-9a-f]+,(\d+)x(\d+),")


class LineReader:
    """Reads lines from a pipe, until the pipe ends or a line is too long."""

    def __init__(self, descriptor: int, on_line: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_line = on_line
        self._on_end = on_end
        self._rest = bytearray()
        self._open = True
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self._on_readable)

    def close(self) -> None:
        """Close the pipe."""
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)

    def _on_readable(self) -> None:
        try:
            chunk = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        begin = len(self._rest)
        self._rest += chunk
        if b"\n" in chunk:
            *lines, rest = self._rest.split(b"\n")
            self._rest = rest
            for line in lines:
                self._on_line(bytes(line))
        elif begin > _LONGEST_LINE or not chunk:
            self.close()
            self._on_end()


@dataclass
class _Question:
    blocks: int
    answer: asyncio.Future[list[list[bytes]]]
    received: list[list[bytes]] = field(default_factory=list)

    def wanted_lines(self) -> int | None:
        """How many lines the current block has; None if its lines cannot look like its end."""
        first = self.received[0][:1] if self.received else []
        words = first[0].split() if first else []
        return int(words[0]) if words and words[0].isdigit() else None


class ControlClient:
    """Sends commands to a tmux server and receives its answers and notifications."""

    def __init__(
        self, commands: int, events: int, on_output: Callable[[bytes], None], on_resize: Callable[[int, int], None]
    ) -> None:
        self.ready = asyncio.Event()
        """Set when the session has started, or when it is known that it will not."""
        self.ended = asyncio.Event()
        self._commands = commands
        self._on_output = on_output
        self._on_resize = on_resize
        self._questions: deque[_Question] = deque()
        self._block: list[bytes] | None = None
        self._block_bytes = 0
        self._guard = b""
        self._ours = False
        self._complaint = ""
        os.set_blocking(commands, False)
        self._reader = LineReader(events, self._on_line, self._end)

    async def ask(self, command: str, blocks: int = 1) -> list[list[bytes]]:
        """Run a command line and return the lines of its answers.

        Of two commands, the first must print the number of lines of the second one's answer.

        Raises:
            ToolError: tmux refuses it, or has ended.
        """
        if self.ended.is_set():
            raise ToolError(self._complaint or "the terminal has ended")
        question = _Question(blocks, asyncio.get_running_loop().create_future())
        self._questions.append(question)
        try:
            os.write(self._commands, command.encode("ascii") + b"\n")
        except (BrokenPipeError, BlockingIOError):
            self._end()
        return await question.answer

    async def ask_numbers(self, command: str, count: int, blocks: int = 1) -> tuple[list[int], list[bytes]]:
        """As `ask`, for a command whose first answer is `count` numbers: these, and the lines of the last answer.

        Raises:
            ToolError: as `ask`, or the answer is something else.
        """
        answer = await self.ask(command, blocks)
        words = answer[0][0].split() if answer[0] else []
        if len(words) != count or not all(word.isdigit() for word in words):
            raise ToolError("tmux does not answer as it should")
        return [int(word) for word in words], answer[-1]

    def close(self) -> None:
        """End the connection."""
        self._end()
        if self._commands >= 0:
            os.close(self._commands)
            self._commands = -1

    def _end(self) -> None:
        self._reader.close()
        self.ended.set()
        self.ready.set()
        while self._questions:
            self._fail(self._questions.popleft(), self._complaint or "the terminal has ended")

    def _on_line(self, line: bytes) -> None:
        if self._block is None:
            self._on_notification(line)
        elif line[:4] in (b"%end", b"%err") and line.partition(b" ")[2] == self._guard and self._is_complete():
            self._on_block(self._block, refused=line.startswith(b"%error"))
            self._block = None
        else:
            self._block.append(line)
            self._block_bytes += len(line)
            if self._block_bytes > _LONGEST_ANSWER:
                self._end()

    def _is_complete(self) -> bool:
        wanted = self._questions[0].wanted_lines() if self._ours and self._questions else None
        return wanted is None or self._block is None or len(self._block) >= wanted

    def _on_notification(self, line: bytes) -> None:
        kind, _, rest = line.partition(b" ")
        if kind == b"%output":
            self._on_output(_ESCAPED.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), rest.partition(b" ")[2]))
        elif kind == b"%begin":
            self._block, self._block_bytes, self._guard = [], 0, rest
            # The last number is 1 in answers to our commands, 0 in those to the client's own ones.
            self._ours = rest.endswith(b" 1")
        elif kind == b"%session-changed":
            self.ready.set()
        elif kind == b"%exit":
            self._end()
        elif (layout := _LAYOUT.match(line)) is not None:
            self._on_resize(int(layout[1]), int(layout[2]))

    def _on_block(self, block: list[bytes], *, refused: bool) -> None:
        complaint = f"tmux: {b' '.join(block).decode(errors='replace')}" if refused else ""
        if not self._ours:
            self._complaint = complaint or self._complaint
            return
        if not self._questions:
            return
        question = self._questions[0]
        question.received.append(block)
        if refused:
            self._fail(self._questions.popleft(), complaint)
        elif len(question.received) == question.blocks:
            self._questions.popleft()
            if not question.answer.done():
                question.answer.set_result(question.received)

    def _fail(self, question: _Question, reason: str) -> None:
        if not question.answer.done():
            question.answer.set_exception(ToolError(reason))
            # Retrieved, so that nothing is logged if no task waits for it.
            question.answer.exception()
