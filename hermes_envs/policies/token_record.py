"""The exact token record of one trajectory.

As docs/architecture.md "Exact tokens" says: the state of a rollout is its token list; what the engine returned is appended
unchanged and never tokenised again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hermes_envs.errors import InexactRolloutError

UNTRAINED_MASK = -100
UNTRAINED_LOGPROB = 1.0
"""Trainers tell untrained tokens by the mask -100 or by this impossible logprob; both are always set."""

LOGPROB_ROUNDING = 1e-4
"""How far above 0 a logprob may come out of an engine's rounding. It is recorded as it came."""


def check_logprobs(token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
    """Assert that there is one usable logprob for each token.

    Raises:
        InexactRolloutError: another number of logprobs than of tokens, or one that is no finite number of at most 0.
    """
    if len(token_ids) != len(logprobs):
        raise InexactRolloutError(f"the engine returned {len(token_ids)} tokens and {len(logprobs)} logprobs")
    for logprob in logprobs:
        if isinstance(logprob, bool) or not isinstance(logprob, (int, float)) or not _is_logprob(logprob):
            raise InexactRolloutError(f"the engine returned {logprob!r} as a logprob")


def _is_logprob(value: float) -> bool:
    return math.isfinite(value) and value <= LOGPROB_ROUNDING


@dataclass
class Segment:
    """A stretch of a rollout in which history only grew.

    `tokens`, `masks` and `logprobs` are aligned: a sampled token has its own id as mask and the engine's logprob, any other
    has `UNTRAINED_MASK` and `UNTRAINED_LOGPROB`.
    """

    tokens: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: int = 0

    def observe(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the policy did not sample: prompt, tool results, template scaffolding."""
        self.tokens.extend(token_ids)
        self.masks.extend([UNTRAINED_MASK] * len(token_ids))
        self.logprobs.extend([UNTRAINED_LOGPROB] * len(token_ids))

    def append_turn(self, context_ids: Sequence[int], token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append a turn: the tokens that its prompt adds to the segment, then those that the engine sampled.

        Takes time proportional to the turn; `check` looks at the whole segment.

        Raises:
            InexactRolloutError: as `check_logprobs`; nothing is recorded then.
        """
        check_logprobs(token_ids, logprobs)
        self.observe(context_ids)
        self.tokens.extend(token_ids)
        self.masks.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.sampled += len(token_ids)

    def check(self) -> None:
        """Assert the invariants of the whole segment, in time proportional to its length.

        Raises:
            InexactRolloutError: one of them does not hold; the message says which.
        """
        if not len(self.tokens) == len(self.masks) == len(self.logprobs):
            raise InexactRolloutError("tokens, masks and logprobs differ in length")
        trained = 0
        for token, mask, logprob in zip(self.tokens, self.masks, self.logprobs, strict=True):
            if mask == UNTRAINED_MASK:
                if logprob != UNTRAINED_LOGPROB:
                    raise InexactRolloutError("a masked token carries a logprob")
            elif mask == token and _is_logprob(logprob):
                trained += 1
            else:
                raise InexactRolloutError("an unmasked token has another id or an impossible logprob")
        if trained != self.sampled:
            raise InexactRolloutError(f"{self.sampled} tokens were sampled but {trained} are unmasked")


@dataclass
class TokenRecord:
    """All segments of one trajectory, oldest first. Empty for policies that have no tokens."""

    trajectory_id: str
    segments: list[Segment] = field(default_factory=list)
    engine_calls: int = 0

    def check(self) -> None:
        """Assert every segment's invariants, once at the end of a trajectory. Raises as `Segment.check`."""
        for segment in self.segments:
            segment.check()
