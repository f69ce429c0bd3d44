"""The trajectories of one task, and what a trainer gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hermes_envs.policies.base import Message, with_text_arguments
from hermes_envs.policies.token_record import Segment
from hermes_envs.rollouts.trajectory import Trajectory

FILLER_TOKENS = 2
"""The least that trainers can shift into inputs and targets."""


Blame = Literal["infrastructure", "defect", "task", "unscored"]
"""Why a rollout has no score: a sandbox, an engine or a tool server failed; the environment's own code did; the task's
environment cannot be built; the environment does not score what the rollout came to."""


@dataclass(frozen=True)
class FailedRollout:
    """A rollout without a score, for no fault of the policy: it has no reward, not a reward of 0."""

    trajectory_id: str
    reason: str
    attempts: int
    blame: Blame = "infrastructure"
    may_pass: bool = True
    """Whether another try could end better."""


@dataclass(frozen=True)
class Group:
    """Everything that was rolled out for one task; the parts together are as many as were asked for."""

    name: str
    trajectories: tuple[Trajectory, ...]
    failures: tuple[FailedRollout, ...]

    @classmethod
    def of(cls, name: str, outcomes: Sequence[Trajectory | FailedRollout]) -> Group:
        """A group of finished rollouts."""
        return cls(
            name,
            tuple(outcome for outcome in outcomes if isinstance(outcome, Trajectory)),
            tuple(outcome for outcome in outcomes if isinstance(outcome, FailedRollout)),
        )

    def blamed(self, blame: Blame) -> list[FailedRollout]:
        """The rollouts that failed for that reason."""
        return [failure for failure in self.failures if failure.blame == blame]

    @property
    def may_be_tried_again(self) -> bool:
        """Whether nothing failed that would only fail again, as a defect does, or a task that cannot be built."""
        return all(failure.blame == "infrastructure" and failure.may_pass for failure in self.failures)

    @property
    def scores(self) -> list[float]:
        """One score for each trajectory."""
        return [trajectory.score.value for trajectory in self.trajectories]

    def items(self) -> list[dict[str, Any]]:
        """atroposlib's `ScoredDataGroup`s, each with one sequence for each trajectory; none if nothing was collected.

        A trajectory whose history was rewritten has several segments: the first item has everybody's first, the next one
        everybody's second, and so on. Who has no segment left is represented by a few tokens of which none is trained. So every
        item has the size that a trainer expects, each trajectory counts once in an item's mean score, and each sampled token is
        trained once, whatever a trainer makes of a group.
        """
        return [self._item(number) for number in range(max(map(_number_of_segments, self.trajectories), default=0))]

    def _item(self, number: int) -> dict[str, Any]:
        segments = [_segment(trajectory, number) for trajectory in self.trajectories]
        return {
            "tokens": [segment.tokens for segment in segments],
            "masks": [segment.masks for segment in segments],
            "scores": self.scores,
            "inference_logprobs": [segment.logprobs for segment in segments],
            "messages": [_plain(trajectory.messages) for trajectory in self.trajectories],
            "overrides": [_overrides(trajectory, number) for trajectory in self.trajectories],
            "group_overrides": {"group_size": len(segments), "segment": number},
        }


def _number_of_segments(trajectory: Trajectory) -> int:
    """A rollout of a policy without tokens counts as one segment without tokens."""
    return max(1, len(trajectory.record.segments))


def _segment(trajectory: Trajectory, number: int) -> Segment:
    segments = trajectory.record.segments
    if number < len(segments):
        return segments[number]
    filler = Segment()
    if segments:
        filler.observe(segments[0].tokens[:FILLER_TOKENS])
    return filler


def _overrides(trajectory: Trajectory, number: int) -> dict[str, Any]:
    segments = _number_of_segments(trajectory)
    # Some trainers look for this; the others find nothing to train.
    filler = {"set_advantage_to_zero": True} if number >= segments else {}
    return {**trajectory.metadata(), "segment": number, "segments": segments, **filler}


def _plain(messages: Sequence[Message]) -> list[Message]:
    """atroposlib's server takes messages whose content is text; a record has the arguments of calls as text, too."""
    return [{**with_text_arguments(message), "content": message.get("content") or ""} for message in messages]
