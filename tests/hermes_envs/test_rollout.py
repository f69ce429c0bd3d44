from __future__ import annotations

import math

import pytest

from hermes_envs.errors import InexactRolloutError
from hermes_envs.policies.token_record import UNTRAINED_LOGPROB, UNTRAINED_MASK, Segment, TokenRecord


def two_turns() -> Segment:
    segment = Segment()
    segment.append_turn([1, 2], [3, 4], [-0.5, -1.0])
    segment.append_turn([5], [6], [0.0])
    return segment


def test_only_sampled_tokens_are_unmasked() -> None:
    segment = two_turns()

    segment.check()

    assert segment.tokens == [1, 2, 3, 4, 5, 6]
    assert segment.masks == [UNTRAINED_MASK, UNTRAINED_MASK, 3, 4, UNTRAINED_MASK, 6]
    assert segment.logprobs == [UNTRAINED_LOGPROB, UNTRAINED_LOGPROB, -0.5, -1.0, UNTRAINED_LOGPROB, 0.0]
    assert segment.sampled == 3


@pytest.mark.parametrize(
    "logprobs",
    [
        [],
        [-1.0],
        [-1.0, -1.0, -1.0],
        [-1.0, None],
        [-1.0, "-1"],
        [-1.0, True],
        [-1.0, math.nan],
        [-math.inf, -1.0],
        [0.5, -1.0],
    ],
)
def test_unusable_logprobs_leave_the_record_as_it_was(logprobs: list[float]) -> None:
    segment = Segment()
    segment.append_turn([1], [2], [-0.5])

    with pytest.raises(InexactRolloutError, match="logprob"):
        segment.append_turn([8], [3, 4], logprobs)

    assert segment.tokens == [1, 2]
    segment.check()


def test_a_logprob_above_zero_by_rounding_is_kept_as_it_came() -> None:
    segment = Segment()
    segment.append_turn([], [3], [1.2e-7])

    segment.check()

    assert segment.logprobs == [1.2e-7]


@pytest.mark.parametrize(
    ("field", "index", "value", "complaint"),
    [
        ("masks", 2, UNTRAINED_MASK, "masked token carries a logprob"),
        ("masks", 0, 1, "impossible logprob"),
        ("masks", 2, 4, "another id"),
        ("logprobs", 0, -0.1, "masked token carries a logprob"),
        ("logprobs", 3, UNTRAINED_LOGPROB, "impossible logprob"),
        ("tokens", 3, 9, "another id"),
    ],
)
def test_check_finds_each_spoiled_entry(field: str, index: int, value: float, complaint: str) -> None:
    segment = two_turns()
    {"tokens": segment.tokens, "masks": segment.masks, "logprobs": segment.logprobs}[field][index] = value  # type: ignore[index]

    with pytest.raises(InexactRolloutError, match=complaint):
        TokenRecord("r", [two_turns(), segment]).check()


def test_check_finds_lost_tokens() -> None:
    shorter, forgotten = two_turns(), two_turns()
    shorter.masks.pop()
    forgotten.sampled += 1

    with pytest.raises(InexactRolloutError, match="differ in length"):
        shorter.check()
    with pytest.raises(InexactRolloutError, match="4 tokens were sampled but 3 are unmasked"):
        forgotten.check()
