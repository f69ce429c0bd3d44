"""Slots as environments of mini-swe-agent: `environment_class: hermes_envs.agent_programs.mini_swe_agent.SlotEnvironment`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from minisweagent.exceptions import Submitted
from pydantic import Field

from backends import BackendOptions
from hermes_envs.agent_programs.pool import TerminalPool
from hermes_envs.agent_programs.terminal import Terminal
from sandbox_image.protocol import ExecutionResult

SUBMISSION = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
"""mini-swe-agent's word for the first line of the output with which an agent hands in the rest of it."""

_SYSTEM = {"system": "-s", "node": "-n", "release": "-r", "version": "-v", "machine": "-m"}


class SlotEnvironmentConfig(BackendOptions):
    """What stands below `environment:` in mini-swe-agent's configuration."""

    cwd: str = Field("", description="Directory of commands, absolute or relative to the workspace.")
    env: dict[str, str] = Field({}, description="Variables of commands.")
    timeout: float = Field(30.0, gt=0, description="Longest that a command may take, in seconds.")
    task_id: str = Field("", description="Environments with the same one share a slot; empty for a slot of its own.")


class SlotEnvironment:
    """An `Environment` of mini-swe-agent 2 whose commands run in a slot.

    All environments of a process with the same backend options share one backend. A command that fails is an output, as in
    mini-swe-agent's own environments; a slot that fails raises `SandboxError`, which ends the agent's run.
    """

    def __init__(self, **options: Any) -> None:
        """`options` are those of `SlotEnvironmentConfig`.

        Raises:
            pydantic.ValidationError: an option is wrong.
            SandboxError: there is no such backend in this version, or it does not start.
        """
        self.config = SlotEnvironmentConfig.model_validate(options)
        self._terminal = Terminal(
            TerminalPool.shared(self.config),
            task_id=self.config.task_id,
            cwd=self.config.cwd,
            variables=self.config.env,
            timeout_s=self.config.timeout,
        )

    def execute(self, action: Mapping[str, Any], cwd: str = "", *, timeout: float | None = None) -> dict[str, Any]:
        """Run `action["command"]`: `output`, `returncode` (-1 without one) and `exception_info`.

        Raises:
            Submitted: the command handed in the agent's work.
            SandboxError: as `Terminal.run`.
        """
        result = self._terminal.run(action.get("command", ""), cwd, timeout)
        output = _as_output(result)
        first, _, submission = result.output.lstrip().partition("\n")
        if first.strip() == SUBMISSION and output["returncode"] == 0:
            extra = {"exit_status": "Submitted", "submission": submission}
            raise Submitted({"role": "exit", "content": submission, "extra": extra})
        return output

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        """What prompts may refer to: the options, and what `uname` says in the slot."""
        return {**self.config.model_dump(), **self._system, **kwargs}

    def serialize(self) -> dict[str, Any]:
        """The environment's part of a trajectory's file."""
        kind = f"{type(self).__module__}.{type(self).__name__}"
        return {"info": {"config": {"environment": self.config.model_dump(mode="json"), "environment_type": kind}}}

    def cleanup(self) -> None:
        """Give the slot back."""
        self._terminal.cleanup()

    def stop(self) -> None:
        """The same as `cleanup`."""
        self._terminal.stop()

    @cached_property
    def _system(self) -> dict[str, str]:
        answer = self._terminal.run("; ".join(f"uname {flag}" for flag in _SYSTEM.values()))
        return dict(zip(_SYSTEM, answer.output.splitlines(), strict=False))


def _as_output(result: ExecutionResult) -> dict[str, Any]:
    exit_code = result.metadata.get("exit_code")
    if exit_code is not None:
        return {"output": result.output, "returncode": exit_code, "exception_info": ""}
    kind = "TimeoutExpired" if result.metadata.get("timeout") else "ToolError"
    return {
        "output": result.output,
        "returncode": -1,
        "exception_info": f"An error occurred while executing the command: {result.error}",
        "extra": {"exception_type": kind, "exception": result.error},
    }
