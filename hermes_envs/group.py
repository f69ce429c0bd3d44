"""The trajectories of one task, and what a trainer gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hermes_envs.policies.base import Message
from hermes_envs.rollout import Segment
from hermes_envs.trajectory import Trajectory


@dataclass(frozen=True)
class InfrastructureFailure:
    """A rollout that could not be completed for no fault of the policy: it has no reward, not a reward of 0."""

    trajectory_id: str
    reason: str
    attempts: int


@dataclass(frozen=True)
class Group:
    """Everything that was rolled out for one task; the parts together are as many as were asked for."""

    name: str
    trajectories: tuple[Trajectory, ...]
    failures: tuple[InfrastructureFailure, ...]

    @property
    def scores(self) -> list[float]:
        """One score for each trajectory."""
        return [trajectory.score.value for trajectory in self.trajectories if trajectory.score is not None]

    def scored_data(self) -> dict[str, Any] | None:
        """The group as atroposlib's `ScoredDataGroup`; None if nothing was collected.

        A trajectory whose history was rewritten gives one sequence for each segment, each with its score; one whose policy has
        no tokens gives a sequence without tokens. `group_overrides` carries the number of sequences.
        """
        sequences = [(trajectory, segment) for trajectory in self.trajectories for segment in _segments(trajectory)]
        if not sequences:
            return None
        return {
            "tokens": [segment.tokens for _, segment in sequences],
            "masks": [segment.masks for _, segment in sequences],
            "scores": [trajectory.score.value for trajectory, _ in sequences if trajectory.score is not None],
            "inference_logprobs": [segment.logprobs for _, segment in sequences],
            "messages": [_plain(trajectory.messages) for trajectory, _ in sequences],
            "overrides": [trajectory.metadata() for trajectory, _ in sequences],
            "group_overrides": {"group_size": len(sequences)},
        }


def _segments(trajectory: Trajectory) -> Sequence[Segment]:
    return trajectory.rollout.segments or [Segment()]


def _plain(messages: Sequence[Message]) -> list[Message]:
    """atroposlib's server takes messages whose content is text."""
    return [{**message, "content": message.get("content") or ""} for message in messages]
