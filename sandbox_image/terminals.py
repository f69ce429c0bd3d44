"""What keeps running in a box from call to call."""

from __future__ import annotations

from sandbox_image.box import Box
from sandbox_image.protocol import ExecutionResult
from sandbox_image.stateful import BashStatefulArguments, StatefulShell

TerminalArguments = BashStatefulArguments


class Terminals:
    """The shell of `bash_stateful` in one box; it ends with the box."""

    def __init__(self, box: Box, uid: int | None, *, sandboxed: bool) -> None:
        self._shell = StatefulShell(box, uid, sandboxed=sandboxed)

    async def execute(self, arguments: TerminalArguments, timeout_s: float) -> ExecutionResult:
        """Run a tool that keeps its state. One call at a time.

        Raises:
            ToolError: the call cannot succeed as it was asked for.
            BoxError: the box died.
        """
        return await self._shell.execute(arguments, timeout_s)

    def close(self) -> None:
        """Let go of everything in the box."""
        self._shell.close()
