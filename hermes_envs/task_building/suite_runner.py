"""Runs a repository's tests in a box, on a copy, with a report on each test."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tarfile
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from hermes_envs.errors import TaskBuildError
from hermes_envs.repositories.python_environment import pack_test_tools
from hermes_envs.task_building.box import Box, BoxResult
from hermes_envs.task_building.source_distribution import write_members

REPOSITORY = "/workspace/repo"
_VIRTUAL_ENVIRONMENT = "/workspace/.venv"
_WHEELS = "/workspace/.wheels"
_REPORT = "/workspace/.report"
_PYTHON = f"{_VIRTUAL_ENVIRONMENT}/bin/python"
_MAX_MEMORY_BYTES = 4 * 1024**3
_INSTALL_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Failure:
    """What a failing test shows: its code up to the failing line, its parameters, the exception's text."""

    code: str
    parameters: dict[str, str]
    message: str


@dataclass(frozen=True)
class SuiteRun:
    """What became of each test, by node id. `problem` is set instead if there is no report.

    `called` holds the file and first line of each function of the repository that ran, if that was asked for.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    durations_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    called: frozenset[tuple[str, int]] = frozenset()
    problem: str | None = None

    @property
    def passed(self) -> set[str]:
        """The tests that passed."""
        return {node_id for node_id, outcome in self.outcomes.items() if outcome == "passed"}


class SuiteRunner:
    """Runs the tests of one project, each time on a fresh copy of its tree.

    The environment is the one that tasks get: a virtual environment with pip and pytest, the repository's root and `src` on its
    path, and whatever the install commands add.
    """

    def __init__(self, scratch: Path) -> None:
        """Nothing is made yet in `scratch`, an existing directory; see `prepare`."""
        self._scratch = scratch
        self._environment = scratch / "environment"

    async def prepare(self, tree: Path, install_commands: Sequence[str] = (), wheels: Path | None = None) -> None:
        """Make the environment. `wheels` holds what the commands install from; they have no network.

        Raises:
            TaskBuildError: a command failed.
        """
        await asyncio.to_thread(self._make_environment)
        if not install_commands:
            return
        with self._copy(tree, {}) as copy:
            readable = {} if wheels is None else {_WHEELS: wheels}
            box = Box(writable={REPOSITORY: copy, _VIRTUAL_ENVIRONMENT: self._environment}, readable=readable)
            env = {
                "PATH": f"{_VIRTUAL_ENVIRONMENT}/bin:/usr/bin:/bin",
                "VIRTUAL_ENV": _VIRTUAL_ENVIRONMENT,
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": _WHEELS,
            }
            for command in install_commands:
                result = await box.run(["/bin/sh", "-c", command], cwd=REPOSITORY, timeout_s=_INSTALL_TIMEOUT_S, env=env)
                if result.exit_code != 0:
                    raise TaskBuildError(f"{command!r} failed: {_last_line(result)}")

    async def run(
        self,
        tree: Path,
        edits: Mapping[str, bytes] | None = None,
        *,
        timeout_s: float,
        trace_calls: bool = False,
    ) -> SuiteRun:
        """Run all tests on a copy of the tree in which some files have other contents."""
        with self._copy(tree, edits or {}) as copy, tempfile.TemporaryDirectory(dir=self._scratch) as report_directory:
            report = Path(report_directory)
            request = {
                "root": REPOSITORY,
                "report": f"{_REPORT}/report",
                "max_memory_bytes": _MAX_MEMORY_BYTES,
                "trace_calls": trace_calls,
            }
            (report / "request").write_text(json.dumps(request), encoding="utf-8")
            driver = files("hermes_envs.task_building").joinpath("suite_driver.py")
            (report / "driver.py").write_bytes(driver.read_bytes())
            box = Box(
                writable={REPOSITORY: copy, _REPORT: report},
                readable={_VIRTUAL_ENVIRONMENT: self._environment},
            )
            command = [_PYTHON, "-I", "-B", f"{_REPORT}/driver.py", f"{_REPORT}/request"]
            result = await box.run(command, cwd=REPOSITORY, timeout_s=timeout_s)
            return _read(report / "report", result, timeout_s)

    def _make_environment(self) -> None:
        venv.EnvBuilder(symlinks=True).create(self._environment)
        site_packages = self._environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        with tarfile.open(fileobj=BytesIO(pack_test_tools())) as archive:
            write_members(archive, archive, site_packages)
        (site_packages / "task_repository.pth").write_text(f"{REPOSITORY}/src\n{REPOSITORY}\n")

    def _copy(self, tree: Path, edits: Mapping[str, bytes]) -> _Copy:
        return _Copy(self._scratch, tree, edits)


class _Copy:
    """A copy of a tree that is there for the length of a block."""

    def __init__(self, scratch: Path, tree: Path, edits: Mapping[str, bytes]) -> None:
        self._tree, self._edits = tree, edits
        self._directory = tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True)

    def __enter__(self) -> Path:
        copy = Path(self._directory.name) / "repo"
        shutil.copytree(self._tree, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for path, content in self._edits.items():
            (copy / path).write_bytes(content)
        return copy

    def __exit__(self, *exc_info: object) -> None:
        self._directory.cleanup()


def _read(report: Path, result: BoxResult, timeout_s: float) -> SuiteRun:
    if result.exit_code is None:
        return SuiteRun(problem=f"the tests took longer than {timeout_s:g} s")
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return SuiteRun(problem=f"the test run ended without a report: {_last_line(result)}")
    tests = content["tests"]
    return SuiteRun(
        outcomes={node_id: test["outcome"] for node_id, test in tests.items()},
        durations_s={node_id: test["duration_s"] for node_id, test in tests.items()},
        failures={
            node_id: Failure(test.get("code", ""), test.get("parameters", {}), test["message"])
            for node_id, test in tests.items()
            if "message" in test
        },
        called=frozenset((path, line) for path, line in content["called"]),
    )


def _last_line(result: BoxResult) -> str:
    lines = result.output.strip().splitlines()
    return lines[-1][:500] if lines else f"exit code {result.exit_code}"
