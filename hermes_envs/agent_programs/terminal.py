"""A slot as a synchronous terminal."""

from __future__ import annotations

import posixpath
import shlex
import uuid
import weakref
from collections.abc import Mapping

from backends.errors import SlotLostError
from hermes_envs.agent_programs.pool import TerminalPool
from sandbox_image.protocol import WORKSPACE, ExecutionResult

TIMED_OUT = 124
"""What coreutils' `timeout` returns, and hermes-agent expects."""
CANNOT_RUN = 126
"""What a shell returns for a command that it cannot run."""


class Terminal:
    """Runs commands in the slot of a task, from any thread. Terminals of the same task share its slot."""

    def __init__(
        self,
        pool: TerminalPool,
        *,
        task_id: str = "",
        cwd: str = "",
        variables: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """`cwd` is absolute or relative to the workspace; a terminal without `task_id` has a task of its own."""
        self.task_id = task_id or uuid.uuid4().hex
        self._pool = pool
        self._cwd = cwd
        self._variables = dict(variables or {})
        self._timeout_s = timeout_s
        pool.open(self.task_id)
        # Runs when the terminal is garbage-collected as well.
        self._leave = weakref.finalize(self, pool.leave, self.task_id)

    def run(self, command: str, cwd: str = "", timeout_s: float | None = None) -> ExecutionResult:
        """Run one command in a fresh shell.

        Raises:
            SlotLostError: the terminal was cleaned up, or its slot is gone with the files in it.
            SandboxError: there is no slot to be had, or it does not answer.
        """
        if not self._leave.alive:
            raise SlotLostError(f"the terminal of task {self.task_id!r} was cleaned up")
        directory = posixpath.normpath(posixpath.join(WORKSPACE, cwd or self._cwd))
        if posixpath.commonpath([WORKSPACE, directory]) != WORKSPACE:
            # The slot server starts commands in the workspace alone; a shell may go where it likes.
            directory, command = WORKSPACE, f"cd -- {shlex.quote(directory)} || exit\n{command}"
        return self._pool.execute(
            self.task_id, command, cwd=directory, variables=self._variables, timeout_s=timeout_s or self._timeout_s
        )

    def execute(self, command: str, cwd: str = "", *, timeout: float | None = None) -> dict[str, object]:
        """Run one command: `output` (both streams, and why it was not run or finished) and `returncode`. Raises as `run`."""
        result = self.run(command, cwd, timeout)
        exit_code = result.metadata.get("exit_code")
        if exit_code is not None:
            return {"output": result.output, "returncode": exit_code}
        returncode = TIMED_OUT if result.metadata.get("timeout") else CANNOT_RUN
        return {"output": f"{result.output}[{result.error}]\n", "returncode": returncode}

    def cleanup(self) -> None:
        """Give the slot back, unless another terminal has the same task; what is in it is gone."""
        self._leave()

    def stop(self) -> None:
        """The same as `cleanup`: nothing of a slot outlives it."""
        self.cleanup()
