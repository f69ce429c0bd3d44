"""Makes a folder of tasks from several packages."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backends.base import ToolBackend
from backends.errors import SandboxError
from hermes_envs.errors import EnvironmentBuildError, TaskBuildError
from hermes_envs.task_building.package_builder import BuilderOptions, BuiltPackage, PackageBuilder
from hermes_envs.task_building.task_folder import WHEELS, add_rows, repository_path
from hermes_envs.task_building.task_repository import keep_tasks

Validator = Callable[[Path, Sequence[str]], Awaitable[dict[str, str]]]


@dataclass
class PackageOutcome:
    """What came of one package: tasks, bugs dropped by reason, or why there is nothing."""

    package: str
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    problem: str | None = None


class TaskSetBuilder:
    """Makes the tasks of packages one after the other and adds them to a folder, each package as soon as it is done."""

    def __init__(
        self, options: BuilderOptions, backend: ToolBackend, validate: Validator, report: Callable[[str], None]
    ) -> None:
        """`validate` tells what is wrong with which tasks of a folder, see `validation.validate`."""
        self._packages = PackageBuilder(options, backend, report)
        self._validate = validate
        self._report = report

    async def build(self, package: str, folder: Path) -> PackageOutcome:
        """Add the tasks of one package to the folder; a package that fails leaves no trace in it."""
        outcome = PackageOutcome(package)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as directory:
            one = Path(directory) / "tasks"
            one.mkdir()
            try:
                built = await self._packages.build(package, one)
                outcome.dropped = built.dropped
                outcome.kept = await self._add_valid(built, one, folder, outcome)
            except* (TaskBuildError, EnvironmentBuildError, SandboxError) as reasons:
                outcome.problem = str(reasons.exceptions[0])
                self._report(f"{package}: {outcome.problem}")
        return outcome

    async def _add_valid(self, built: BuiltPackage, one: Path, folder: Path, outcome: PackageOutcome) -> int:
        self._report(f"{built.name}: validating {len(built.rows)} tasks")
        problems = await self._validate(one, [row.instance_id for row in built.rows])
        for instance_id, problem in problems.items():
            self._report(f"{instance_id}: dropped: {problem}")
            outcome.dropped["does not validate"] += 1
        rows = [row for row in built.rows if row.instance_id not in problems]
        if not rows:
            raise TaskBuildError(f"{built.name}: no task validates")
        repository = repository_path(one, rows[0].repo)
        keep_tasks(repository, [row.instance_id for row in rows])
        target = repository_path(folder, rows[0].repo)
        if target.exists():
            raise TaskBuildError(f"{built.name} is there already")
        target.parent.mkdir(parents=True, exist_ok=True)
        repository.rename(target)
        for wheel in (one / WHEELS).glob("*.whl"):
            (folder / WHEELS).mkdir(exist_ok=True)
            shutil.move(wheel, folder / WHEELS / wheel.name)
        add_rows(folder, rows)
        return len(rows)
