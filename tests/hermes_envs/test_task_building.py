"""Tasks made from a source distribution: fetched, broken, tested, reported, validated."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from backends.local import LocalBackend, LocalOptions
from hermes_envs.errors import EnvironmentBuildError
from hermes_envs.task_building.package_builder import BuilderOptions, PackageBuilder
from hermes_envs.task_building.source_distribution import fetch
from hermes_envs.task_building.suite_runner import Failure, SuiteRunner
from hermes_envs.task_building.task_folder import add_rows, repository_path
from hermes_envs.task_building.task_set_builder import TaskSetBuilder
from hermes_envs.task_building.validation import validate
from tests.support.coin_purse import SOURCES, make_archive
from tests.support.task_rows import read_rows

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[LocalBackend]:
    async with LocalBackend(LocalOptions(local_slots=2)) as started:
        yield started


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive") / "coin_purse-1.0.tar.gz", SOURCES)


OPTIONS = BuilderOptions(per_package=4, multi_file_share=0.25)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(backend: LocalBackend, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> SuiteRunner:
    source = await fetch(str(archive), tmp_path_factory.mktemp("source"))
    return await SuiteRunner.for_tree(backend, source.tree)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built(backend: LocalBackend, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    await PackageBuilder(OPTIONS, backend, lambda line: None).build(str(archive), folder)
    return folder


def git(repository: Path, *arguments: str) -> str:
    return subprocess.run(["git", f"--git-dir={repository}", *arguments], check=True, capture_output=True, text=True).stdout


def apply(patch: str, tree: Path) -> None:
    subprocess.run(["git", "apply", "-"], input=patch, cwd=tree, check=True, text=True)


def contents(tree: Path) -> dict[str, bytes]:
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def running_commands() -> set[bytes]:
    """The command lines of all processes of the machine."""
    commands = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.add(path.read_bytes())
    return commands


async def test_suite_is_reported(runner: SuiteRunner) -> None:
    run = await runner.run(timeout_s=60, trace_calls=True)
    assert run.tests.outcomes["tests/test_purse.py::test_change[0 [none]]"] == "passed"
    assert run.tests.outcomes["tests/test_purse.py::test_has_no_network"] == "passed"
    assert set(run.tests.outcomes) - run.tests.passed == {"tests/test_purse.py::test_fails_always"}
    assert run.tests.durations_s.keys() == run.tests.outcomes.keys()
    assert run.failures.keys() == {"tests/test_purse.py::test_fails_always"}
    assert run.failures["tests/test_purse.py::test_fails_always"].message.startswith("assert False")
    called = {line for path, line in run.calls if path == "coin_purse/words.py"}
    assert 4 in called
    assert 15 not in called


FAILING = """import pytest


class Broken:
    def __repr__(self):
        raise KeyError


@pytest.mark.parametrize("thing, broken", [(object(), Broken())], ids=["one"])
def test_things(thing, broken):
    first = 1
    raise ValueError(
        thing
    )
    second = 2
"""


async def test_what_a_failing_test_shows(runner: SuiteRunner) -> None:
    """Without the addresses of objects, which differ in each run."""
    run = await runner.run({"tests/test_purse.py": FAILING.encode()}, timeout_s=60)
    assert run.failures == {
        "tests/test_purse.py::test_things[one]": Failure(
            code="".join(FAILING.splitlines(keepends=True)[8:14]),
            parameters={"thing": "<object object at 0x...>", "broken": "<Broken whose repr fails with KeyError>"},
            message="ValueError: <object object at 0x...>",
        )
    }


async def test_suite_is_what_the_projects_configuration_says(runner: SuiteRunner) -> None:
    changes = {
        "pytest.ini": b"[pytest]\ntestpaths = checks\npython_files = check_*.py\n",
        "checks/check_a.py": b"def test(): pass\n",
    }
    run = await runner.run(changes, timeout_s=60)
    assert run.tests.outcomes == {"checks/check_a.py::test": "passed"}


async def test_each_run_starts_from_the_same_tree(runner: SuiteRunner) -> None:
    await runner.run({"tests/test_more.py": b"def test(): pass\n", "coin_purse/words.py": b""}, timeout_s=60)
    run = await runner.run(timeout_s=60)
    assert run.tests.outcomes["tests/test_purse.py::test_words"] == "passed"
    assert "tests/test_more.py::test" not in run.tests.outcomes


async def test_suite_that_does_not_end_is_killed(runner: SuiteRunner) -> None:
    seconds = str(1_000_000 + os.getpid())
    endless = f"import subprocess, time\nsubprocess.Popen(['sleep', '{seconds}'])\ntime.sleep({seconds})\n".encode()
    run = await runner.run({"coin_purse/words.py": endless}, timeout_s=3)
    assert run.tests.problem == "the tests took longer than 3 s"
    assert not run.tests.outcomes
    # The slot is reset in the background; this test's own time limit ends the wait.
    while f"sleep\0{seconds}\0".encode() in running_commands():  # noqa: ASYNC110 - no event tells of other processes
        await asyncio.sleep(0.05)


async def test_suite_that_ends_the_process_has_no_report(runner: SuiteRunner) -> None:
    run = await runner.run({"coin_purse/words.py": b"import os\nos._exit(0)\n"}, timeout_s=60)
    assert run.tests.problem is not None
    assert "without a report" in run.tests.problem


async def test_suite_that_changes_the_test_runner_is_not_believed(runner: SuiteRunner) -> None:
    """Its tasks could not be graded."""
    run = await runner.run(
        {"conftest.py": b"import unittest\nunittest.TestCase.fail = lambda self, message: None\n"}, timeout_s=60
    )
    assert run.tests.problem is not None
    assert "tampered with" in run.tests.problem


async def test_failing_install_command(backend: LocalBackend, archive: Path, tmp_path: Path) -> None:
    source = await fetch(str(archive), tmp_path)
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    command = "python -m pip install nowhere-to-be-found"
    runner = await SuiteRunner.for_tree(backend, source.tree, install_commands=[command], wheels=[wheel])
    with pytest.raises(EnvironmentBuildError, match=f"'{command}' failed: .*No matching distribution"):
        await runner.run(timeout_s=60)


async def test_rows(built: Path) -> None:
    rows = read_rows(built)
    assert len(rows) == 4
    assert [row.patch.count("diff --git") for row in rows] == [1, 1, 1, 2]
    for row in rows:
        named = [*row.FAIL_TO_PASS, *row.PASS_TO_PASS]
        assert row.repo == "pypi/coin-purse"
        assert row.FAIL_TO_PASS
        assert row.PASS_TO_PASS
        assert "tests/test_purse.py::test_fails_always" not in named
        assert not any("0x" in name for name in named)
        assert len(named) == 6
        assert row.problem_statement.startswith("# ")
        assert "test_" not in row.problem_statement


async def test_patch_makes_the_named_tests_pass(built: Path, runner: SuiteRunner, tmp_path: Path) -> None:
    for row in read_rows(built):
        tree = tmp_path / row.instance_id
        tree.mkdir()
        git(repository_path(built, row.repo), f"--work-tree={tree}", "checkout", "--force", row.base_commit, "--", ".")
        before = await runner.run(contents(tree), timeout_s=60)
        assert not before.tests.passed & set(row.FAIL_TO_PASS)
        assert before.tests.passed >= set(row.PASS_TO_PASS)
        apply(row.patch, tree)
        after = await runner.run(contents(tree), timeout_s=60)
        assert after.tests.passed >= {*row.FAIL_TO_PASS, *row.PASS_TO_PASS}


async def test_same_seed_same_tasks(backend: LocalBackend, built: Path, archive: Path, tmp_path: Path) -> None:
    await PackageBuilder(OPTIONS, backend, lambda line: None).build(str(archive), tmp_path)
    assert read_rows(tmp_path) == read_rows(built)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tests/test_purse.py": "def test():\n    assert False\n"}, "none of 1 tests passes"),
        ({"tests/test_purse.py": "def test():\n    pass\n"}, "its tests tell of no bug"),
        ({"tests/test_purse.py": "import os\nos._exit(3)\n"}, "without a report"),
        ({"PKG-INFO": "Name: x\n"}, "lacks Name or Version"),
    ],
    ids=["no test passes", "no test tells", "no report", "no version"],
)
async def test_package_without_tasks(backend: LocalBackend, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", {**SOURCES, **changes})
    output = tmp_path / "output"
    output.mkdir()
    builder = TaskSetBuilder(OPTIONS, backend, validate, lambda line: None)
    outcome = await builder.build(str(archive), output)
    assert outcome.kept == 0
    assert outcome.problem is not None
    assert message in outcome.problem
    assert list(output.iterdir()) == []


async def test_failing_slots_are_the_end_of_a_package(archive: Path, tmp_path: Path) -> None:
    outcome = await TaskSetBuilder(OPTIONS, LocalBackend(LocalOptions()), validate, lambda line: None).build(
        str(archive), tmp_path
    )
    assert outcome.problem == "the backend is not running"
    assert not contents(tmp_path)


async def test_tasks_that_do_not_validate_are_dropped_without_a_trace(
    backend: LocalBackend, archive: Path, tmp_path: Path
) -> None:
    """The validation is a stand-in that finds fault with one task; the real one runs in the test below."""

    async def find_fault(folder: Path, instance_ids: Sequence[str]) -> dict[str, str]:
        assert [row.instance_id for row in read_rows(folder)] == list(instance_ids)
        return {instance_ids[0]: "oracle scores 0, 0"}

    lines: list[str] = []
    outcome = await TaskSetBuilder(OPTIONS, backend, find_fault, lines.append).build(str(archive), tmp_path)
    rows = read_rows(tmp_path)
    assert outcome.kept == len(rows) == 3
    assert outcome.dropped["does not validate"] == 1
    assert any(line.endswith("dropped: oracle scores 0, 0") for line in lines)
    branches = git(repository_path(tmp_path, rows[0].repo), "for-each-ref", "--format=%(refname:short)").split()
    assert sorted(branches) == sorted(row.instance_id for row in rows)


NEW_FILE = "diff --git a/NOTE b/NOTE\nnew file mode 100644\n--- /dev/null\n+++ b/NOTE\n@@ -0,0 +1 @@\n+nothing\n"


async def test_validation_runs_the_tasks(built: Path, tmp_path: Path) -> None:
    """The product's own command line, with a task whose patch does not fix it and one that needs no fix."""
    good = read_rows(built)[0]
    useless = replace(good, instance_id="useless", patch=NEW_FILE)
    solved = replace(good, instance_id="solved", FAIL_TO_PASS=good.PASS_TO_PASS[:1], PASS_TO_PASS=good.PASS_TO_PASS[1:])
    (tmp_path / "repositories").symlink_to(built / "repositories")
    add_rows(tmp_path, [good, useless, solved])
    problems = await validate(tmp_path, [good.instance_id, "useless", "solved", "absent"])
    assert set(problems) == {"useless", "solved", "absent"}


async def test_command_line(archive: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(root / "scripts" / "build_swe_tasks.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    (tmp_path / "taken").write_text("")
    done = await asyncio.to_thread(run, str(archive), "--output", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"--output: {tmp_path} is not an empty directory\n"
    done = await asyncio.to_thread(run, "no such package", "--output", str(tmp_path / "new"))
    assert done.returncode == 1
    assert "neither a file nor a requirement" in done.stdout
