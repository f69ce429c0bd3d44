"""The account of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from hermes_envs.errors import EnvironmentDefectError, NothingCollectedError
from hermes_envs.rollouts.group import Blame, Group
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
    failures: dict[Blame, dict[str, str]] = field(default_factory=lambda: {blame: {} for blame in get_args(Blame)})
    """The reasons of rollouts without a score, by what is to blame; a task that is set aside is named once for all of its."""
    groups_set_aside: int = 0
    last_failure: str = ""
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
            name = group.name if failure.blame == "task" else failure.trajectory_id
            self.failures[failure.blame][name] = self.last_failure = failure.reason
        if not group.trajectories:
            self.failed_groups += 1
            self.groups_set_aside += bool(group.blamed("task"))
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
            last = next(reversed(self.failures["defect"].values()))
            groups = self.groups_with_defects
            raise EnvironmentDefectError(
                f"all of the first {groups} groups ended in a defect of the environment's code: {last}"
            )

    def give_up_if_hopeless(self, first_groups: int) -> None:
        """End a run in which nothing works: an engine that is not there fails every group alike.

        Raises:
            NothingCollectedError: each of the first `first_groups` groups, and there are so many, failed.
        """
        failed = self.failed_groups - self.groups_set_aside
        if self.groups == 0 and failed >= first_groups:
            raise NothingCollectedError(f"all of the first {failed} groups failed; the last because of {self.last_failure}")

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
            **({"defects of the environment": len(defects)} if (defects := self.failures["defect"]) else {}),
            **({"not scored": len(unscored)} if (unscored := self.failures["unscored"]) else {}),
            "tool calls": self.tool_calls,
            **{f"seconds in {phase}": f"{seconds:.1f}" for phase, seconds in self.seconds.items()},
            "tasks set aside": len(self.failures["task"]),
            "rows skipped": len(self.skipped_rows),
        }
        if self.groups_served or self.groups_dropped:
            rows["groups for the trainer"] = self.groups_served
            rows |= {f"groups dropped: {reason}": groups for reason, groups in self.groups_dropped.items()}
            rows["evaluations failed"] = self.failed_evaluations
        for name, value in rows.items():
            table.add_row(name, str(value))
        return table
