"""Runs all tests of a project in slots, as its tasks are graded, with what a user would see of each test that fails."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from backends.base import ToolBackend
from hermes_envs.errors import TaskBuildError
from hermes_envs.grading.test_run import TestRun, run_tests
from hermes_envs.repositories.git import BRANCH
from hermes_envs.repositories.python_environment import REPOSITORY, PythonEnvironment
from hermes_envs.repositories.repository import RepositoryCache
from hermes_envs.task_building.task_repository import TaskRepository
from hermes_envs.workspace import Workspace, explain

_SETUP_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Failure:
    """What a failing test shows: its code up to the failing line, its parameters, the exception's text."""

    code: str
    parameters: dict[str, str]
    message: str


class SuiteRun(BaseModel):
    """A run of all tests: what became of them, and the failures by node id.

    `calls` holds the file and first line of each function of the repository that ran, if that was asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tests: TestRun
    failures: dict[str, Failure] = {}
    calls: frozenset[tuple[str, int]] = frozenset()


class SuiteRunner:
    """Runs the tests of one project, each time in a fresh slot that starts from the layer that the project's tasks get."""

    def __init__(self, backend: ToolBackend, environment: PythonEnvironment) -> None:
        self._backend = backend
        self._environment = environment

    @classmethod
    async def for_tree(
        cls, backend: ToolBackend, tree: Path, *, install_commands: Sequence[str] = (), wheels: Sequence[Path] = ()
    ) -> SuiteRunner:
        """A runner of the tests in a directory; the commands install from the wheels alone if there are any.

        Raises:
            TaskBuildError: git is missing or fails.
        """
        with tempfile.TemporaryDirectory() as scratch:
            await asyncio.to_thread(_commit, tree, Path(scratch) / "clean.git")
            cache = RepositoryCache(Path(scratch) / "snapshots", Path(scratch).as_uri(), _SETUP_TIMEOUT_S)
            snapshot = await cache.snapshot("clean", BRANCH)
        return cls(backend, PythonEnvironment(snapshot, tuple(install_commands), tuple(wheels), _SETUP_TIMEOUT_S))

    async def run(self, edits: Mapping[str, bytes] | None = None, *, timeout_s: float, trace_calls: bool = False) -> SuiteRun:
        """Run all tests on the tree with other contents in some of its files.

        Raises:
            EnvironmentBuildError: the project's environment cannot be built.
            TaskBuildError: a file cannot be written.
            SandboxError: the slot failed.
        """
        plugins = {"failures": _plugin("failure_plugin")} | ({"calls": _plugin("call_plugin")} if trace_calls else {})
        async with self._backend.slot("test suite", layer=self._environment.layer(self._backend)) as slot:
            workspace = Workspace(self._backend, slot)
            for path, content in (edits or {}).items():
                written = await workspace.write(f"{REPOSITORY}/{path}", content)
                if not written.success:
                    raise TaskBuildError(f"cannot write {path}: {explain(written)}")
            return _read(await run_tests(workspace, None, timeout_s, plugins=plugins))


def _commit(tree: Path, git_directory: Path) -> None:
    repository = TaskRepository(git_directory)
    repository.add_task(BRANCH, repository.add_tree(tree))


def _read(tests: TestRun) -> SuiteRun:
    try:
        return SuiteRun.model_validate({**tests.findings, "tests": tests})
    except ValidationError as reason:
        return SuiteRun(tests=TestRun(problem=f"the report is malformed: {reason.errors()[0]['msg']}"))


@cache
def _plugin(name: str) -> str:
    return files("hermes_envs.task_building").joinpath(f"{name}.py").read_text(encoding="utf-8")
