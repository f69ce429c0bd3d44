"""What is made of a batch: which tokens are trained, with which advantage, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from hermes_envs.train.batch import make_batch

PROMPT, SAMPLED = [1, 2], [7, 8, 9]


def item(*scores: float, sampled: list[list[int]] | None = None, **more: Any) -> dict[str, Any]:
    """A group with a sequence for each score: a prompt, and what was sampled."""
    answers = sampled or [SAMPLED] * len(scores)
    return {
        "tokens": [PROMPT + answer for answer in answers],
        "masks": [[-100, -100, *answer] for answer in answers],
        "inference_logprobs": [[1.0, 1.0, *(-0.5 for _ in answer)] for answer in answers],
        "scores": list(scores),
        "overrides": None,
        **more,
    }


def test_an_advantage_is_the_score_less_the_mean_of_the_group() -> None:
    batch = make_batch([item(1.0, 0.0, 0.5, 0.5), item(1.0, 0.0)], 100, 10)
    assert [max(sequence.advantages, key=abs) for sequence in batch.sequences] == [0.5, -0.5, 0.5, -0.5]
    assert (batch.received, batch.without_advantage, batch.tokens) == (6, 2, 12)
    assert batch.mean_reward == pytest.approx(0.5)
    assert batch.mean_absolute_advantage == 0.5


def test_what_was_not_sampled_has_neither_advantage_nor_logprob() -> None:
    first = make_batch([item(1.0, 0.0)], 100, 10).sequences[0]
    assert (first.inputs, first.targets) == ([1, 2, 7, 8], [2, 7, 8, 9])
    assert first.logprobs == [0.0, -0.5, -0.5, -0.5]
    assert first.advantages == [0.0, 0.5, 0.5, 0.5]
    assert first.trained == [1, 2, 3]


def test_segments_weigh_as_one_trajectory() -> None:
    """Two segments of the first trajectory, one of the second: the means and the mean reward are over two trajectories."""
    first = [{"trajectory_id": "a", "segment": 0, "segments": 2}, {"trajectory_id": "b", "segment": 0, "segments": 1}]
    second = [
        {"trajectory_id": "a", "segment": 1, "segments": 2},
        {"trajectory_id": "b", "segment": 1, "segments": 1, "set_advantage_to_zero": True},
    ]
    items = [
        item(1.0, 0.0, overrides=first),
        item(1.0, 0.0, sampled=[[5], []], overrides=second),
    ]
    batch = make_batch(items, 100, 10)
    assert [(sequence.targets[-1], sequence.advantages[-1]) for sequence in batch.sequences] == [(9, 0.5), (9, -0.5), (5, 0.5)]
    assert batch.rewards == [1.0, 0.0]
    assert batch.without_advantage == 1


def test_a_sequence_that_is_asked_to_be_left_out_still_counts_for_the_mean() -> None:
    batch = make_batch([item(1.0, 0.0, overrides=[{"set_advantage_to_zero": True}, {}])], 100, 10)
    assert [sequence.advantages[-1] for sequence in batch.sequences] == [-0.5]


def test_equal_scores_leave_nothing_to_train_on() -> None:
    batch = make_batch([item(0.5, 0.5)], 100, 10)
    assert batch.sequences == []
    assert (batch.without_advantage, batch.mean_absolute_advantage, batch.refused) == (2, 0.0, [])


def test_a_sequence_that_is_too_long_is_dropped_whole_and_counted() -> None:
    batch = make_batch([item(1.0, 0.0, sampled=[[7] * 4, [7] * 3])], 5, 10)
    assert [len(sequence.inputs) for sequence in batch.sequences] == [4]
    assert batch.too_long == 1


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    one = item(1.0, 0.0)
    one = {key: [list(row) if isinstance(row, list) else row for row in rows] if rows else rows for key, rows in one.items()}
    change(one)
    return one


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: one["inference_logprobs"][1].pop(), "differ in length"),
        (lambda one: one["masks"][1].pop(), "differ in length"),
        (lambda one: one["masks"][0].__setitem__(2, 6), "another id"),
        (lambda one: one["masks"][0].__setitem__(2, -100), "a masked token carries a logprob"),
        (lambda one: one["inference_logprobs"][0].__setitem__(0, -0.5), "a masked token carries a logprob"),
        (lambda one: one["inference_logprobs"][0].__setitem__(2, 1.0), "impossible logprob"),
        (lambda one: one["inference_logprobs"][0].__setitem__(2, math.nan), "impossible logprob"),
        (lambda one: one["inference_logprobs"][0].__setitem__(2, -math.inf), "impossible logprob"),
        (lambda one: one["tokens"][0].__setitem__(0, 10), "outside of the vocabulary"),
        (lambda one: one["scores"].__setitem__(0, math.nan), "scores"),
        (lambda one: one["scores"].pop(), "1 scores"),
        (lambda one: one.update(inference_logprobs=None), "lacks"),
        (lambda one: (one["masks"][0].__setitem__(0, 1), one["inference_logprobs"][0].__setitem__(0, -1.0)), "first token"),
    ],
)
def test_an_item_that_breaks_the_format_is_refused_as_a_whole(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    batch = make_batch([broken(change), item(1.0, 0.0)], 100, 10)
    assert len(batch.refused) == 1
    assert reason in batch.refused[0]
    assert len(batch.sequences) == 2
    assert batch.received == 4
