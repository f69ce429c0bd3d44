"""Finds out which tests tell of each bug of the shipped tasks."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hermes_envs.demo import DemoBug, bugs
from hermes_envs.errors import TaskBuildError
from hermes_envs.task_building.suite_runner import SuiteRunner
from hermes_envs.task_building.task_repository import TaskRepository

_TIMEOUT_S = 60.0
_JOBS = 2


async def observe_tests(scratch: Path, selected: Sequence[DemoBug] | None = None) -> dict[DemoBug, dict[str, list[str]]]:
    """Run each repository's suite without and with each bug; `FAIL_TO_PASS` and `PASS_TO_PASS` of each bug, sorted.

    Raises:
        TaskBuildError: a repository's own tests do not pass, a patch does not apply, or a run ended without a report.
    """
    chosen = bugs() if selected is None else selected
    runner = SuiteRunner(scratch)
    repositories = {bug.repository: bug.sources for bug in chosen}
    await runner.prepare(next(iter(repositories.values())))
    jobs = asyncio.Semaphore(_JOBS)

    async def passed(tree: Path, edits: dict[str, bytes], *, all_of_them: bool) -> set[str]:
        async with jobs:
            run = await runner.run(tree, edits, timeout_s=_TIMEOUT_S)
        if run.problem is not None:
            raise TaskBuildError(f"{tree.name}: {run.problem}")
        if all_of_them and len(run.passed) != len(run.outcomes):
            raise TaskBuildError(f"{tree.name}: fails without a bug: {sorted(set(run.outcomes) - run.passed)}")
        return run.passed

    async with asyncio.TaskGroup() as group:
        clean = {name: group.create_task(passed(tree, {}, all_of_them=True)) for name, tree in repositories.items()}
        buggy = {
            bug: group.create_task(passed(bug.sources, await asyncio.to_thread(_edits, bug, scratch), all_of_them=False))
            for bug in chosen
        }
    return {
        bug: {
            "FAIL_TO_PASS": sorted(clean[bug.repository].result() - buggy[bug].result()),
            "PASS_TO_PASS": sorted(clean[bug.repository].result() & buggy[bug].result()),
        }
        for bug in chosen
    }


async def record_tests(report: Callable[[str], None]) -> None:
    """Write what `observe_tests` finds beside each bug, and a line about it to `report`. Raises as it does."""
    with tempfile.TemporaryDirectory() as scratch:
        for bug, tests in (await observe_tests(Path(scratch))).items():
            bug.tests.write_text(json.dumps(tests, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            report(f"{bug.instance_id}: {len(tests['FAIL_TO_PASS'])} fail, {len(tests['PASS_TO_PASS'])} pass")


def _edits(bug: DemoBug, scratch: Path) -> dict[str, bytes]:
    """The contents of the files that the bug changes."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        repository = TaskRepository(Path(directory) / "repository")
        clean = repository.add_tree(bug.sources)
        return repository.changed_files(clean, repository.patched_tree(clean, bug.patch.read_bytes()))
