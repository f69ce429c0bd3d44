"""The `tmux` tool: a terminal in a box, for programs that need one.

A tmux server runs in the box, with one session of one window of one pane. A control-mode client stays connected to it: the
output of the pane is recorded as it comes, and an action starts no process. Beside them, a small loop in the box tells what the
shell of the pane does at the moment. These three and the programs in the terminal are one kept command.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sandbox_image.box.box import Box
from sandbox_image.errors import ToolError
from sandbox_image.protocol import MAX_OUTPUT_BYTES, MAX_TIMEOUT_S, ExecutionResult, ProtocolError, Range, Wire
from sandbox_image.tools.recording import Recording
from sandbox_image.tools.shell import OutputBuffer, relative_to_workspace, variables_of
from sandbox_image.tools.tmux_pane import Pane

MAX_WIDTH, MAX_HEIGHT = 1000, 500
DEFAULT_WIDTH, DEFAULT_HEIGHT = 80, 24
CAPTURE_S = 1.0
"""What is left of a call's time, if it has that much, for the capture after a wait."""


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
        """Check the types that the annotations do not.

        Raises:
            ProtocolError: a key is not a string.
        """
        if not set(map(type, self.texts)) <= {str}:
            raise ProtocolError("field 'keys' must be a string or a list of strings")


class Tmux:
    """The terminal of a slot, and the recording of its output."""

    def __init__(self, box: Box, *, sandboxed: bool) -> None:
        self.recording = Recording()
        self._box = box
        self._sandboxed = sandboxed
        self._pane: Pane | None = None

    async def execute(self, arguments: TmuxArguments, timeout_s: float) -> ExecutionResult:
        """Do one action.

        Raises:
            ToolError: it cannot be done; the text says why.
            BoxError: the box died.
        """
        start = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                output, truncated, metadata = await self._act(arguments, start + timeout_s - min(CAPTURE_S, timeout_s / 2))
        except TimeoutError:
            raise ToolError(f"timed out after {timeout_s:g} s; the terminal goes on") from None
        metadata |= {"action": arguments.action, "truncated": truncated, "sandboxed": self._sandboxed}
        metadata["duration_s"] = round(time.monotonic() - start, 6)
        return ExecutionResult(success=True, output=output, metadata=metadata)

    def close(self) -> None:
        """Kill the terminal and the programs in it."""
        pane, self._pane = self._pane, None
        if pane is not None:
            pane.close()

    async def _act(self, arguments: TmuxArguments, wait_until: float) -> tuple[str, bool, dict[str, Any]]:
        # Mistakes that a model can make are unsuccessful results for it to read, not request errors.
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
            return await self._use(pane, arguments, wait_until)
        finally:
            if not pane.alive:
                self.close()

    async def _use(self, pane: Pane, arguments: TmuxArguments, wait_until: float) -> tuple[str, bool, dict[str, Any]]:
        waited: dict[str, Any] = {}
        if arguments.action == "send_keys":
            calm = await pane.send_keys(
                arguments.texts,
                literal=arguments.literal,
                min_wait_s=arguments.min_wait_s,
                until=time.monotonic() + arguments.max_wait_s if arguments.block else None,
                end=wait_until,
            )
            waited = {"timeout": not calm}
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
        size = arguments.pane_width or DEFAULT_WIDTH, arguments.pane_height or DEFAULT_HEIGHT
        cwd, variables = relative_to_workspace(arguments.cwd), variables_of(arguments.env)
        self._pane = await Pane.start(self._box, self.recording, size, cwd=cwd, variables=variables)

    async def _stop(self) -> tuple[str, bool, dict[str, Any]]:
        if self._pane is not None:
            pane, self._pane = self._pane, None
            await pane.stop()
        return "", False, {}

    def _stream(self, arguments: TmuxArguments) -> tuple[str, bool, dict[str, Any]]:
        lines, more = self.recording.next_lines(arguments.max_bytes, from_start=arguments.reset)
        metadata = {"events": len(lines), "more": more, "recording_full": self.recording.full}
        return b"".join(lines).decode(), False, metadata

    def _require_pane(self) -> Pane:
        if self._pane is None:
            raise ToolError("there is no terminal; `start` one first")
        return self._pane
