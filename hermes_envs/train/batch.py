"""What of a batch is trained on: every sampled token once, with the advantage of its trajectory.

An item of a batch holds one sequence of each trajectory of a group. A trajectory with several segments comes as several
items, and one with fewer segments than its neighbours is represented by a sequence without sampled tokens: so the mean of an
item's scores is always the mean over trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hermes_envs.errors import EngineError
from hermes_envs.policies.token_record import UNTRAINED_MASK, Segment


@dataclass(frozen=True)
class TrainingSequence:
    """Aligned lists; a target that was not sampled has logprob and advantage 0."""

    inputs: list[int]
    targets: list[int]
    logprobs: list[float]
    advantages: list[float]
    trained: list[int]
    """The positions of sampled targets."""


@dataclass
class TrainingBatch:
    """The sequences of a step, and an account of what came and what became of it."""

    sequences: list[TrainingSequence] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    received: int = 0
    without_advantage: int = 0
    too_long: int = 0
    refused: list[str] = field(default_factory=list)
    """Why an item was not trained on; one reason for each."""

    @property
    def tokens(self) -> int:
        """How many tokens are trained."""
        return sum(len(sequence.trained) for sequence in self.sequences)

    @property
    def mean_reward(self) -> float:
        """The mean over trajectories, each of which counts once; NaN if none came."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else math.nan

    @property
    def mean_absolute_advantage(self) -> float:
        """The mean over trained tokens; 0 if there are none."""
        advantages = [abs(sequence.advantages[at]) for sequence in self.sequences for at in sequence.trained]
        return sum(advantages) / len(advantages) if advantages else 0.0


class UnusableItemError(Exception):
    """An item of a batch that must not be trained on; the text says why."""


def make_batch(items: Sequence[Mapping[str, Any]], longest: int, vocabulary_size: int) -> TrainingBatch:
    """Check a batch of run-api and give each sampled token its advantage: its trajectory's score less the mean of the item.

    This is GRPO (arXiv 2402.03300) without division by the standard deviation, which would favour tasks that are nearly
    always or nearly never solved (arXiv 2503.20783). A sequence of more than `longest` tokens is dropped and counted, never
    cut; an item that violates the format is refused as a whole.
    """
    batch = TrainingBatch()
    for item in items:
        try:
            _check(item, vocabulary_size)
        except UnusableItemError as reason:
            batch.received += len(item.get("tokens") or [])
            batch.refused.append(str(reason))
            continue
        _add(batch, item, longest)
    return batch


def _add(batch: TrainingBatch, item: Mapping[str, Any], longest: int) -> None:
    scores = item["scores"]
    baseline = sum(scores) / len(scores)
    for index, tokens in enumerate(item["tokens"]):
        batch.received += 1
        override = _override(item, index)
        if not override.get("segment"):
            batch.rewards.append(scores[index])
        advantage = 0.0 if override.get("set_advantage_to_zero") else scores[index] - baseline
        trained = [at for at, mask in enumerate(item["masks"][index][1:]) if mask != UNTRAINED_MASK]
        if advantage == 0.0 or not trained:
            batch.without_advantage += 1
        elif len(tokens) > longest:
            batch.too_long += 1
        else:
            batch.sequences.append(_sequence(tokens, item["inference_logprobs"][index], trained, advantage))


def _sequence(tokens: list[int], logprobs: list[float], trained: list[int], advantage: float) -> TrainingSequence:
    sampled = frozenset(trained)
    targets = tokens[1:]
    return TrainingSequence(
        inputs=tokens[:-1],
        targets=targets,
        # Of an untrained token the service computes a ratio, too: the record's impossible logprob must not reach it.
        logprobs=[logprobs[at + 1] if at in sampled else 0.0 for at in range(len(targets))],
        advantages=[advantage if at in sampled else 0.0 for at in range(len(targets))],
        trained=trained,
    )


def _override(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    overrides = item.get("overrides") or []
    return overrides[index] or {} if index < len(overrides) else {}


def _check(item: Mapping[str, Any], vocabulary_size: int) -> None:
    """Raises: UnusableItemError: the item is not what the environment's rollouts look like."""
    tokens, masks, scores, logprobs = (item.get(key) for key in ("tokens", "masks", "scores", "inference_logprobs"))
    if not tokens or not masks or not scores or not logprobs:
        raise UnusableItemError("it lacks tokens, masks, scores or inference_logprobs")
    if not len(tokens) == len(masks) == len(scores) == len(logprobs):
        raise UnusableItemError(
            f"it has {len(tokens)} sequences, {len(masks)} masks, {len(scores)} scores and {len(logprobs)} lists of logprobs"
        )
    if not all(math.isfinite(score) for score in scores):
        raise UnusableItemError(f"its scores are {scores}")
    for sequence in zip(tokens, masks, logprobs, strict=True):
        _check_sequence(Segment(*sequence), vocabulary_size)


def _check_sequence(segment: Segment, vocabulary_size: int) -> None:
    segment.sampled = sum(mask != UNTRAINED_MASK for mask in segment.masks)
    try:
        segment.check()
    except EngineError as reason:
        raise UnusableItemError(str(reason)) from reason
    strange = next((token for token in segment.tokens if not 0 <= token < vocabulary_size), None)
    if strange is not None:
        raise UnusableItemError(f"token {strange} is outside of the vocabulary of {vocabulary_size}")
    if segment.masks and segment.masks[0] != UNTRAINED_MASK:
        raise UnusableItemError("its first token is marked as sampled, which nothing can precede")
