"""Finds out which tests tell of each bug of the shipped tasks."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from backends.base import ToolBackend
from backends.local import LocalBackend, LocalOptions
from hermes_envs.demo import DemoBug, bugs
from hermes_envs.errors import TaskBuildError
from hermes_envs.task_building.suite_runner import SuiteRun, SuiteRunner
from hermes_envs.task_building.task_repository import TaskRepository

_TIMEOUT_S = 60.0


async def observe_tests(backend: ToolBackend) -> dict[DemoBug, dict[str, list[str]]]:
    """Run each repository's suite without and with each bug; `FAIL_TO_PASS` and `PASS_TO_PASS` of each bug, sorted.

    As many suites run at the same time as the backend has slots.

    Raises:
        TaskBuildError: a repository's own tests do not pass, a patch does not apply, or a run ended without a report.
    """
    trees = {bug.repository: bug.sources for bug in bugs()}
    runners = {name: await SuiteRunner.for_tree(backend, tree) for name, tree in trees.items()}
    edits = {bug: await asyncio.to_thread(_edits, bug) for bug in bugs()}
    async with asyncio.TaskGroup() as group:
        clean = {name: group.create_task(runner.run(timeout_s=_TIMEOUT_S)) for name, runner in runners.items()}
        buggy = {bug: group.create_task(runners[bug.repository].run(edits[bug], timeout_s=_TIMEOUT_S)) for bug in bugs()}
    reliable = {name: _passed(name, run.result()) for name, run in clean.items()}
    for name, run in clean.items():
        if failing := run.result().tests.outcomes.keys() - reliable[name]:
            raise TaskBuildError(f"{name}: fails without a bug: {sorted(failing)}")
    passed = {bug: _passed(bug.instance_id, run.result()) for bug, run in buggy.items()}
    return {
        bug: {
            "FAIL_TO_PASS": sorted(reliable[bug.repository] - passed[bug]),
            "PASS_TO_PASS": sorted(reliable[bug.repository] & passed[bug]),
        }
        for bug in bugs()
    }


def _passed(name: str, run: SuiteRun) -> set[str]:
    if run.tests.problem is not None:
        raise TaskBuildError(f"{name}: {run.tests.problem}")
    return run.tests.passed


async def record_tests(report: Callable[[str], None]) -> None:
    """Write what `observe_tests` finds beside each bug, and a line about it to `report`. Raises as it does."""
    async with LocalBackend(LocalOptions(local_slots=2)) as backend:
        observed = await observe_tests(backend)
    for bug, tests in observed.items():
        bug.tests.write_text(json.dumps(tests, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        report(f"{bug.instance_id}: {len(tests['FAIL_TO_PASS'])} fail, {len(tests['PASS_TO_PASS'])} pass")


def _edits(bug: DemoBug) -> dict[str, bytes]:
    """The contents of the files that the bug changes."""
    with tempfile.TemporaryDirectory() as scratch:
        repository = TaskRepository(Path(scratch) / "repository")
        clean = repository.add_tree(bug.sources)
        return repository.changed_files(clean, repository.patched_tree(clean, bug.patch.read_bytes()))
