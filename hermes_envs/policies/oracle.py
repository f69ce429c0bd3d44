"""A policy that plays a task's reference solution: the solved task must score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hermes_envs.errors import ConfigError
from hermes_envs.policies.base import Conversation, Message, Policy, Reference, Turn, assistant_message
from hermes_envs.policies.token_record import TokenRecord

FINAL_MESSAGE = "The reference solution has been applied."


class OraclePolicy(Policy):
    """Makes the calls of the reference solution through the same tools as a model would."""

    def start(
        self, trajectory_id: str, *, tools: Sequence[dict[str, Any]], reference: Reference | None = None
    ) -> OracleConversation:
        """As `Policy.start`.

        Raises:
            ConfigError: the task has no reference solution.
        """
        if reference is None:
            raise ConfigError(f"policy: oracle needs a reference solution, and the task of {trajectory_id!r} has none")
        return OracleConversation(trajectory_id, reference)


class OracleConversation(Conversation):
    """Makes one call of the reference a turn, then ends with the reference's text or a standard one."""

    def __init__(self, trajectory_id: str, reference: Reference) -> None:
        self.record = TokenRecord(trajectory_id)
        self._moves = iter(reference)

    async def respond(self, new_messages: Sequence[Message]) -> Turn:
        """As `Conversation.respond`; raises nothing."""
        move = next(self._moves, FINAL_MESSAGE)
        if isinstance(move, str):
            return Turn(assistant_message(move), (), "stop")
        return Turn(assistant_message("", [move]), (move,), "tool_calls")
