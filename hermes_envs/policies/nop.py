"""A policy that does nothing: an untouched task must not score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hermes_envs.policies.base import Conversation, Message, Policy, Reference, Turn, assistant_message
from hermes_envs.policies.token_record import TokenRecord

FINAL_MESSAGE = "Nothing was done."


class NopPolicy(Policy):
    """Ends every trajectory at once, with one message."""

    validates = True

    def start(
        self, trajectory_id: str, *, tools: Sequence[dict[str, Any]], reference: Reference | None = None
    ) -> NopConversation:
        return NopConversation(trajectory_id)


class NopConversation(Conversation):
    """One message without calls."""

    def __init__(self, trajectory_id: str) -> None:
        self.record = TokenRecord(trajectory_id)

    async def respond(self, new_messages: Sequence[Message]) -> Turn:
        """As `Conversation.respond`; raises nothing."""
        return Turn(assistant_message(FINAL_MESSAGE), (), "stop")
