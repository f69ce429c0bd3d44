"""The account of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hermes_envs.errors import EnvironmentDefectError
from hermes_envs.rollouts.group import Group
from hermes_envs.rollouts.trajectory import Phase

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Summary:
    """What a run did. Every rollout that was asked for is a trajectory or counted by what kept it from being one."""

    groups: int = 0
    failed_groups: int = 0
    trajectories: int = 0
    infrastructure_errors: int = 0
    """Rollouts that a sandbox, an engine or a tool server ended, and those of tasks that are set aside."""
    groups_with_defects: int = 0
    tool_calls: int = 0
    score_sum: float = 0.0
    solved_share_sum: float = 0.0
    seconds: dict[Phase, float] = field(default_factory=dict)
    failure_reasons: dict[str, str] = field(default_factory=dict)
    """Rollouts that infrastructure ended, and how; as `unscored` and `defects`."""
    unscored: dict[str, str] = field(default_factory=dict)
    defects: dict[str, str] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    skipped_rows: list[str] = field(default_factory=list)
    groups_served: int = 0
    """Finished groups that were for a trainer; `groups_dropped` counts those that were not, by the reason."""
    groups_dropped: dict[str, int] = field(default_factory=dict)
    failed_evaluations: int = 0

    def add(self, group: Group) -> None:
        """Count a finished group; one without any trajectory has failed."""
        self.infrastructure_errors += len(group.blamed("infrastructure")) + len(group.blamed("task"))
        self.groups_with_defects += bool(group.blamed("defect"))
        for failure in group.failures:
            match failure.blame:
                case "defect":
                    self.defects[failure.trajectory_id] = failure.reason
                case "task":
                    self.set_aside[group.name] = failure.reason
                case "unscored":
                    self.unscored[failure.trajectory_id] = failure.reason
                case "infrastructure":
                    self.failure_reasons[failure.trajectory_id] = failure.reason
        if not group.trajectories:
            self.failed_groups += 1
            return
        self.groups += 1
        self.trajectories += len(group.trajectories)
        self.score_sum += sum(group.scores)
        self.solved_share_sum += sum(score >= 1.0 for score in group.scores) / len(group.scores)
        for trajectory in group.trajectories:
            self.tool_calls += trajectory.tool_counts.attempted
            for phase, seconds in trajectory.stopwatch.seconds.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def give_up_on_defects(self, first_groups: int) -> None:
        """End a run whose environment cannot work.

        Raises:
            EnvironmentDefectError: each of the first `first_groups` groups, and there are so many, had a defect.
        """
        if self.groups_with_defects == self.groups + self.failed_groups >= first_groups:
            last = next(reversed(self.defects.values()))
            raise EnvironmentDefectError(f"all of the first {self.groups_with_defects} groups had one, the last: {last}")

    @property
    def mean_score(self) -> float:
        """The mean over trajectories."""
        return self.score_sum / self.trajectories if self.trajectories else 0.0

    @property
    def pass_at_1(self) -> float:
        """The mean over groups of the share of trajectories that reached a score of 1."""
        return self.solved_share_sum / self.groups if self.groups else 0.0

    def table(self, title: str) -> Table:
        """The account that ends a run."""
        # Heavy, and most that import this never print it.
        from rich.table import Table

        table = Table(title=title, show_header=False)
        rows: dict[str, Any] = {
            "groups": self.groups,
            "groups without a trajectory": self.failed_groups,
            "trajectories": self.trajectories,
            "mean score": f"{self.mean_score:.3f}",
            "pass@1": f"{self.pass_at_1:.3f}",
            "infrastructure errors": self.infrastructure_errors,
            **({"defects of the environment": len(self.defects)} if self.defects else {}),
            **({"not scored": len(self.unscored)} if self.unscored else {}),
            "tool calls": self.tool_calls,
            **{f"seconds in {phase}": f"{seconds:.1f}" for phase, seconds in self.seconds.items()},
            "tasks set aside": len(self.set_aside),
            "rows skipped": len(self.skipped_rows),
        }
        if self.groups_served or self.groups_dropped:
            rows["groups for the trainer"] = self.groups_served
            rows |= {f"groups dropped: {reason}": groups for reason, groups in self.groups_dropped.items()}
            rows["evaluations failed"] = self.failed_evaluations
        for name, value in rows.items():
            table.add_row(name, str(value))
        return table
