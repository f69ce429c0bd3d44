"""Plays a task's reference solution, to show that the task can be solved and that solving it scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hermes_envs.errors import ConfigError
from hermes_envs.policies.base import Conversation, Message, Policy, Turn, assistant_message
from hermes_envs.rollout import Rollout
from hermes_envs.tools.call import ToolCall

FINAL_MESSAGE = "The reference solution has been applied."


class OraclePolicy(Policy):
    """Makes the calls of the reference solution through the same tools as a model would."""

    def start(
        self, trajectory_id: str, *, tools: Sequence[dict[str, Any]], reference: Sequence[ToolCall] | None = None
    ) -> OracleConversation:
        """As `Policy.start`.

        Raises:
            ConfigError: the task has no reference solution.
        """
        if reference is None:
            raise ConfigError(f"policy: oracle needs a reference solution, and the task of {trajectory_id!r} has none")
        return OracleConversation(trajectory_id, reference)


class OracleConversation(Conversation):
    """One call a turn, whatever the tools answer, then a message without calls."""

    def __init__(self, trajectory_id: str, reference: Sequence[ToolCall]) -> None:
        self.rollout = Rollout(trajectory_id)
        self._calls = iter(reference)

    async def respond(self, new_messages: Sequence[Message]) -> Turn:
        """As `Conversation.respond`; raises nothing."""
        call = next(self._calls, None)
        if call is None:
            return Turn(assistant_message(FINAL_MESSAGE), (), "stop")
        return Turn(assistant_message("", [call]), (call,), "tool_calls")
