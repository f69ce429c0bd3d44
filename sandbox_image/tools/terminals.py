"""The tools that keep state in a box between calls."""

from __future__ import annotations

from sandbox_image.box.box import Box
from sandbox_image.protocol import ExecutionResult
from sandbox_image.tools.stateful import BashStatefulArguments, StatefulShell
from sandbox_image.tools.tmux import Tmux, TmuxArguments

TerminalArguments = BashStatefulArguments | TmuxArguments


class Terminals:
    """The shell of `bash_stateful` and the terminal of `tmux` in one box; they end with it."""

    def __init__(self, box: Box, uid: int | None, *, sandboxed: bool) -> None:
        self._shell = StatefulShell(box, uid, sandboxed=sandboxed)
        self._tmux = Tmux(box, sandboxed=sandboxed)

    async def execute(self, arguments: TerminalArguments, timeout_s: float) -> ExecutionResult:
        """Run a tool that keeps its state. One call at a time.

        Raises:
            ToolError: the call cannot succeed as it was asked for.
            BoxError: the box died.
        """
        if isinstance(arguments, TmuxArguments):
            return await self._tmux.execute(arguments, timeout_s)
        return await self._shell.execute(arguments, timeout_s)

    def recording(self) -> bytes:
        """The recording of the terminal, as an asciicast file; empty if there was no terminal."""
        return self._tmux.recording.content()

    def close(self) -> None:
        """Kill both."""
        self._shell.close()
        self._tmux.close()
