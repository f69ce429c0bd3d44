"""How many tokens of the context a prompt and a turn may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hermes_envs.policies.base import ContextFullError

LEAST_ANSWER_TOKENS = 16
"""The least room that a turn is asked for with: a short tool call."""

WANTED_ROOM = 1 / 4
"""The share of the context that is kept free for a turn, unless `turn` is less: a longer prompt is shortened."""

SHORTENED_PROMPT = 1 / 2
"""The share of the context that a shortened prompt fills at most, so that several turns follow before the next cut."""


@dataclass(frozen=True)
class TokenLimits:
    """The most tokens of one turn, and of prompt and turn together; at least one of them is known."""

    turn: int | None
    context: int | None

    @property
    def prompt(self) -> float:
        """The most tokens of a prompt before it is shortened."""
        if self.context is None:
            return math.inf
        wanted = WANTED_ROOM * self.context
        return self.context - min(wanted, self.turn or wanted)

    @property
    def shortened_prompt(self) -> float:
        """The most tokens of a shortened prompt, if one so short is possible."""
        return math.inf if self.context is None else SHORTENED_PROMPT * self.context

    def room(self, prompt_tokens: int) -> int:
        """How many tokens a turn may have after a prompt of this length.

        Raises:
            ContextFullError: fewer than a turn is asked for with.
        """
        if self.context is None:
            assert self.turn is not None, "one of the two is known"
            return self.turn
        room = self.context - prompt_tokens
        if room < min(LEAST_ANSWER_TOKENS, self.turn or LEAST_ANSWER_TOKENS):
            raise ContextFullError(f"the prompt has {prompt_tokens} tokens of {self.context} (max_context_tokens)")
        return room if self.turn is None else min(room, self.turn)
