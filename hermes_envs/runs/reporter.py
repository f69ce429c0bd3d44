"""How far a run is, for a person who watches it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hermes_envs.rollouts.group import Blame, Group
from hermes_envs.runs.summary import Summary

if TYPE_CHECKING:
    from rich.console import Console


_LABELS: dict[Blame, str] = {
    "task": "set aside",
    "defect": "defect",
    "unscored": "not scored",
    "infrastructure": "infrastructure error",
}


class Reporter:
    """Shows how far a run is: a bar on a terminal, a line for each group elsewhere."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        # Heavy, and most that import this never run anything.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
        problems = [
            f"{label}: {name}: {reason}" for blame, label in _LABELS.items() for name, reason in summary.failures[blame].items()
        ]
        problems += [f"row skipped: {reason}" for reason in summary.skipped_rows]
        for problem in problems[:50]:
            self._console.print(problem, markup=False, highlight=False)
        if len(problems) > 50:
            self._console.print(f"... and {len(problems) - 50} more")
