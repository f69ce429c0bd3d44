"""Makes tasks from one package: puts bugs in, runs its tests, keeps what they tell apart."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from backends.base import ToolBackend
from hermes_envs.errors import TaskBuildError
from hermes_envs.grading.test_run import TestRun
from hermes_envs.task_building.mutation import FunctionInfo, Mutation, MutationPlan, is_test_path
from hermes_envs.task_building.problem_statement import write_problem_statement
from hermes_envs.task_building.source_distribution import SourceDistribution, build_wheels, fetch
from hermes_envs.task_building.suite_runner import Failure, SuiteRunner
from hermes_envs.task_building.task_folder import WHEELS, TaskRow, add_rows, repository_path
from hermes_envs.task_building.task_repository import TaskRepository

OWNER = "pypi"

TEST_REQUIREMENTS = {"funcy": ("whatever",)}
"""What the tests of a package need and its source distribution does not say."""


class BuilderOptions(BaseModel):
    """How many tasks are made of a package, and which count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_package: int = Field(12, ge=1, description="Tasks to make of each package, at most.")
    seed: int = Field(0, description="Another seed makes other bugs.")
    jobs: int = Field(2, ge=1, description="Test suites that run at the same time.")
    multi_file_share: float = Field(0.25, ge=0, le=1, description="Share of the tasks with bugs in two files.")
    tries_per_task: int = Field(4, ge=1, description="Bugs to try for each task, at most.")
    suite_timeout_s: float = Field(180.0, gt=0, description="Longest that a package's suite without a bug may take.")
    test_timeout_s: float = Field(5.0, gt=0, description="Tests that take longer are left out.")
    min_passing_share: float = Field(0.5, ge=0, le=1, description="Share of the tests that a bug must leave passing.")


@dataclass(frozen=True)
class Bug:
    """Mutations that tests tell of; `edits` are the contents of the files that have them."""

    mutations: tuple[Mutation, ...]
    edits: dict[str, bytes]
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    failures: dict[str, Failure]

    @property
    def functions(self) -> list[FunctionInfo]:
        return [mutation.function for mutation in self.mutations]

    @property
    def name(self) -> str:
        """The kinds and digests, as a part of the instance id."""
        return "__".join(f"{mutation.kind}-{mutation.digest}" for mutation in self.mutations)


@dataclass(frozen=True)
class BuiltPackage:
    """What came of a package; `dropped` counts the bugs that make no task, by reason."""

    name: str
    rows: tuple[TaskRow, ...]
    dropped: Counter[str]


class PackageBuilder:
    """Makes the tasks of one package. Tests run in slots of the backend; `report` gets lines about the progress."""

    def __init__(self, options: BuilderOptions, backend: ToolBackend, report: Callable[[str], None]) -> None:
        self._options = options
        self._backend = backend
        self._report = report

    async def build(self, package: str, folder: Path) -> BuiltPackage:
        """Write a task folder for a package, a requirement or the path of a source distribution, into an empty directory.

        Raises:
            TaskBuildError: the package cannot be fetched, or its tests cannot be run or do not pass.
            EnvironmentBuildError: the environment of its tasks cannot be built.
            SandboxError: a slot failed.
        """
        with tempfile.TemporaryDirectory(dir=folder.parent) as directory:
            scratch = Path(directory)
            source = await fetch(package, scratch)
            self._report(f"{source.name} {source.version}: fetched")
            install_commands = await self._collect_wheels(source, folder / WHEELS)
            wheels = await asyncio.to_thread(lambda: sorted((folder / WHEELS).glob("*.whl")))
            runner = await SuiteRunner.for_tree(self._backend, source.tree, install_commands=install_commands, wheels=wheels)
            texts = await asyncio.to_thread(_modules, source.tree)
            search = _BugSearch(self._options, self._report, source.name, texts, runner)
            bugs = await search.find()
            rows = await asyncio.to_thread(_write, folder, scratch / "repository", source, bugs, install_commands)
            return BuiltPackage(source.name, tuple(rows), search.dropped)

    async def _collect_wheels(self, source: SourceDistribution, folder: Path) -> list[str]:
        requirements = [*source.requirements, *TEST_REQUIREMENTS.get(source.name, ())]
        if not requirements:
            return []
        await build_wheels(requirements, folder)
        return [shlex.join(["python", "-m", "pip", "install", "--quiet", *requirements])]


@dataclass
class _BugSearch:
    """The search for bugs in one package.

    `texts` are its modules by path, `clean` the tests to rely on, `timeout_s` how long its suite may take with a bug.
    """

    options: BuilderOptions
    report: Callable[[str], None]
    name: str
    texts: dict[str, str]
    runner: SuiteRunner
    dropped: Counter[str] = field(default_factory=Counter)
    clean: frozenset[str] = frozenset()
    timeout_s: float = 0.0

    async def find(self) -> list[Bug]:
        """The bugs to make tasks of: those in one file first, then those in two."""
        called = await self._run_clean()
        plan = await asyncio.to_thread(MutationPlan, self.texts, f"{self.name}-{self.options.seed}", called)
        self.report(f"{self.name}: {len(self.clean)} tests, {len(plan)} places for bugs")
        wanted_pairs = int(self.options.per_package * self.options.multi_file_share) if len(self.texts) > 1 else 0
        singles = await self._collect(((mutation,) for mutation in plan), self.options.per_package + wanted_pairs)
        if not singles:
            raise TaskBuildError(f"{self.name}: its tests tell of no bug that was tried")
        pairs = await self._collect(_pairs(singles[::-1]), wanted_pairs)
        paired = {mutation for pair in pairs for mutation in pair.mutations}
        unpaired = [bug for bug in singles if bug.mutations[0] not in paired]
        return [*unpaired[: self.options.per_package - len(pairs)], *pairs]

    async def _run_clean(self) -> frozenset[tuple[str, int]]:
        """Find the tests to rely on, and the functions that they reach."""
        first = (await self.runner.run(timeout_s=self.options.suite_timeout_s)).tests
        traced = await self.runner.run(timeout_s=self.options.suite_timeout_s * 3, trace_calls=True)
        second = traced.tests
        for tests in (first, second):
            if tests.problem is not None:
                raise TaskBuildError(f"{self.name}: {tests.problem}")
        # Parameters in the order of a set name other tests in each run: none of the function's can be relied on.
        unstable = {_function_of(node_id) for node_id in first.passed ^ second.passed}
        self.clean = frozenset(
            node_id
            for node_id in first.passed & second.passed
            if is_usable(node_id)
            and _function_of(node_id) not in unstable
            and first.durations_s[node_id] <= self.options.test_timeout_s
        )
        if not self.clean:
            raise TaskBuildError(f"{self.name}: none of {len(first.outcomes)} tests passes")
        if left_out := len(first.outcomes) - len(self.clean):
            self.report(f"{self.name}: {left_out} tests are left out: not always passing, slow or with unstable names")
        # Generous: which bugs are kept is not to depend on what else the machine does.
        self.timeout_s = max(30.0, 10 * first.duration_s)
        return traced.calls

    async def _collect(self, candidates: Iterator[tuple[Mutation, ...]], wanted: int) -> list[Bug]:
        """Try candidates, a few at a time, until so many make a bug."""
        found: list[Bug] = []
        tries = wanted * self.options.tries_per_task
        while len(found) < wanted and tries > 0:
            # Choosing among the places of a large package takes a while.
            batch = await asyncio.to_thread(lambda size: list(islice(candidates, size)), min(self.options.jobs, tries))
            if not batch:
                break
            tries -= len(batch)
            async with asyncio.TaskGroup() as group:
                attempts = [group.create_task(self._try(mutations)) for mutations in batch]
            found += [bug for attempt in attempts if (bug := attempt.result()) is not None]
        return found[:wanted]

    async def _try(self, mutations: tuple[Mutation, ...]) -> Bug | None:
        edits = {mutation.path: mutation.applied_to(self.texts[mutation.path]).encode() for mutation in mutations}
        run = await self.runner.run(edits, timeout_s=self.timeout_s)
        passed = run.tests.passed
        reason = self._objection(run.tests)
        kinds = " and ".join(f"{mutation.kind} in {mutation.function.dotted_name}" for mutation in mutations)
        if reason is not None:
            self.dropped[reason] += 1
            self.report(f"{self.name}: {kinds}: {reason}")
            return None
        failing = sorted(self.clean - passed)
        self.report(f"{self.name}: {kinds}: {len(failing)} tests fail")
        failures = {node_id: run.failures[node_id] for node_id in failing if node_id in run.failures}
        return Bug(mutations, edits, tuple(failing), tuple(sorted(self.clean & passed)), failures)

    def _objection(self, tests: TestRun) -> str | None:
        """Why a bug makes no task."""
        if tests.problem is not None:
            return "the tests do not end" if "took longer" in tests.problem else "the test run breaks down"
        if not self.clean <= set(tests.outcomes):
            return "tests cannot be collected"
        if self.clean <= tests.passed:
            return "no test fails"
        if len(self.clean & tests.passed) < max(1.0, self.options.min_passing_share * len(self.clean)):
            return "too many tests fail"
        return None


def is_usable(node_id: str) -> bool:
    """Whether a node id is of a file of tests, and means the same everywhere.

    That is one printable line without a path of this machine or an object's address. Documentation that is tested lies in the
    very files that have the bugs, and those must not be protected from changes.
    """
    path, separator, _ = node_id.partition("::")
    is_test = bool(separator) and path.endswith(".py") and is_test_path(path)
    return is_test and node_id.isprintable() and not any(text in node_id for text in ("/workspace", "/tmp", " at 0x"))


def _function_of(node_id: str) -> str:
    """The node id without parameters."""
    return node_id.partition("[")[0]


def _modules(tree: Path) -> dict[str, str]:
    """The modules of the packages at the root or in `src`, tests excluded, by path."""
    texts = {}
    for path in sorted(tree.rglob("*.py")):
        relative = path.relative_to(tree)
        top = tree / relative.parts[0] if relative.parts[0] != "src" else tree / "/".join(relative.parts[:2])
        is_packaged = (top / "__init__.py").is_file() or (relative.parts[0] == "src" and len(relative.parts) == 2)
        is_root_module = len(relative.parts) == 1
        if is_test_path(relative.as_posix()) or not (is_packaged or is_root_module):
            continue
        content = path.read_bytes()
        # Other line ends would change wherever a line is edited.
        if b"\r" not in content and b"\f" not in content and not content.startswith(b"\xef\xbb\xbf"):
            try:
                texts[relative.as_posix()] = content.decode()
            except UnicodeDecodeError:
                continue
    return texts


def _pairs(bugs: Sequence[Bug]) -> Iterator[tuple[Mutation, ...]]:
    """Two bugs of different files each, every bug used once."""
    pending = list(bugs)
    while pending:
        first = pending.pop(0)
        for second in pending:
            if first.mutations[0].path != second.mutations[0].path:
                pending.remove(second)
                yield (*first.mutations, *second.mutations)
                break


def _write(
    folder: Path, scratch: Path, source: SourceDistribution, bugs: Sequence[Bug], install_commands: list[str]
) -> list[TaskRow]:
    repo = f"{OWNER}/{source.name}"
    repository = TaskRepository(scratch)
    clean = repository.add_tree(source.tree)
    rows = []
    for bug in bugs:
        buggy = repository.edited_tree(clean, bug.edits)
        instance_id = f"{OWNER}__{source.name}-{source.version}.{bug.name}"
        rows.append(
            TaskRow(
                instance_id=instance_id,
                repo=repo,
                base_commit=repository.add_task(instance_id, buggy),
                problem_statement=write_problem_statement(bug.functions, bug.failures),
                patch=repository.diff(buggy, clean),
                FAIL_TO_PASS=list(bug.fail_to_pass),
                PASS_TO_PASS=list(bug.pass_to_pass),
                install_commands=install_commands,
            )
        )
    repository.publish(repository_path(folder, repo))
    add_rows(folder, rows)
    return rows
