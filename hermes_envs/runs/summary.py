"""The account of a run, and how far it is while it goes on."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hermes_envs.errors import EnvironmentDefectError
from hermes_envs.rollouts.group import Group
from hermes_envs.rollouts.trajectory import Phase


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


class Reporter:
    """Shows how far a run is: a bar on a terminal, a line for each group elsewhere."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(file=sys.stdout, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=self._console
        )
        self._task = self._progress.add_task(title)
        self._done = 0

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def expect(self, groups: int) -> None:
        """Say how many groups there will be."""
        self._progress.update(self._task, total=groups)

    def finished(self, group: Group, seconds: float) -> None:
        """Say that a group has ended."""
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        scores = ", ".join(f"{score:g}" for score in group.scores) or "no trajectory"
        failed = f", {len(group.failures)} without a score" if group.failures else ""
        if not self._console.is_terminal:
            line = f"{self._title} group {self._done}: {group.name}: {scores}{failed} ({seconds:.1f} s)"
            self._console.print(line, markup=False, highlight=False)

    def tell(self, text: str) -> None:
        """Print a line."""
        self._console.print(f"{self._title}: {text}", markup=False, highlight=False)

    def conclude(self, summary: Summary) -> None:
        """Print the account, and each reason why something is missing from it."""
        self._console.print(summary.table(self._title))
        problems = [f"set aside: {name}: {reason}" for name, reason in summary.set_aside.items()]
        problems += [f"{reason} (rollout {name})" for name, reason in summary.defects.items()]
        problems += [f"not scored: {name}: {reason}" for name, reason in summary.unscored.items()]
        problems += [f"infrastructure error: {name}: {reason}" for name, reason in summary.failure_reasons.items()]
        problems += [f"row skipped: {reason}" for reason in summary.skipped_rows]
        for problem in problems[:50]:
            self._console.print(problem, markup=False, highlight=False)
        if len(problems) > 50:
            self._console.print(f"... and {len(problems) - 50} more")
