"""Tasks made from a source distribution: fetched, broken, tested, reported, validated."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from hermes_envs.errors import TaskBuildError
from hermes_envs.task_building.box import Box
from hermes_envs.task_building.mutation import FunctionInfo
from hermes_envs.task_building.package_builder import BuilderOptions, PackageBuilder, is_usable
from hermes_envs.task_building.problem_statement import write_problem_statement
from hermes_envs.task_building.source_distribution import fetch
from hermes_envs.task_building.suite_runner import Failure, SuiteRunner
from hermes_envs.task_building.task_folder import read_rows, repository_path, write_rows
from hermes_envs.task_building.task_set_builder import TaskSetBuilder
from hermes_envs.task_building.validation import validate

SOURCES = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: Coin_Purse\nVersion: 1.0\nRequires-Dist: sphinx; extra == 'doc'\n",
    # Source distributions hold generated files that their repositories ignore.
    ".gitignore": "coin_purse/words.py\n",
    "setup.py": "raise SystemExit('nothing runs this')\n",
    "coin_purse/__init__.py": "from coin_purse.change import make_change\nfrom coin_purse.words import in_words\n",
    "coin_purse/change.py": '''"""Change."""


def make_change(amount, coins=(50, 20, 10, 5, 2, 1)):
    """The fewest coins that make up an amount, largest first.

    Raises ValueError for a negative amount.
    """
    if amount < 0:
        raise ValueError("no such amount")
    change = []
    for coin in coins:
        count, amount = divmod(amount, coin)
        change.extend([coin] * count)
    return change
''',
    "coin_purse/words.py": '''"""Words."""


def in_words(coins):
    """Coins as text."""
    groups = {}
    for coin in coins:
        groups[coin] = groups.get(coin, 0) + 1
    if not groups:
        return "nothing"
    return ", ".join(f"{count} x {coin}" for coin, count in groups.items())


def never_called(coins):
    total = 0
    for coin in coins:
        total += coin
    return total
''',
    "coin_purse/__pycache__/words.cpython-311.pyc": "stale",
    "tests/test_purse.py": '''import os

import pytest

from coin_purse import in_words, make_change


@pytest.mark.parametrize(
    "amount, expected", [(0, []), (3, [2, 1]), (88, [50, 20, 10, 5, 2, 1])], ids=["0 [none]", "3 ct", "88 ct"]
)
def test_change(amount, expected):
    assert make_change(amount) == expected


def test_negative():
    """Debts."""
    with pytest.raises(ValueError):
        make_change(-1)


@pytest.mark.parametrize("thing", [object()], ids=repr)
def test_name_with_address(thing):
    assert make_change(1) == [1]


@pytest.mark.parametrize("number, letter", enumerate(set("abcdefghijklmnop")))
def test_order_of_a_set(number, letter):
    assert make_change(1) == [1]


def test_words():
    assert in_words([]) == "nothing"
    assert in_words([2, 2, 1]) == "2 x 2, 1 x 1"


def test_fails_always():
    assert False


def test_has_no_network():
    assert os.listdir("/sys/class/net") == ["lo"] if os.path.isdir("/sys/class/net") else True
''',
}


def make_archive(path: Path, files: dict[str, str], extra: Sequence[tarfile.TarInfo] = ()) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"coin_purse-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for member in extra:
            archive.addfile(member)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive") / "coin_purse-1.0.tar.gz", SOURCES)


OPTIONS = BuilderOptions(per_package=4, multi_file_share=0.25)


@pytest.fixture(scope="module")
def built(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    asyncio.run(PackageBuilder(OPTIONS, lambda line: None).build(str(archive), folder))
    return folder


def git(repository: Path, *arguments: str) -> str:
    return subprocess.run(["git", f"--git-dir={repository}", *arguments], check=True, capture_output=True, text=True).stdout


def apply(patch: str, tree: Path) -> None:
    subprocess.run(["git", "apply", "-"], input=patch, cwd=tree, check=True, text=True)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*")}


def running_commands() -> set[bytes]:
    """The command lines of all processes of the machine."""
    commands = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.add(path.read_bytes())
    return commands


async def test_fetch(archive: Path, tmp_path: Path) -> None:
    source = await fetch(str(archive), tmp_path)
    assert (source.name, source.version, source.requirements) == ("coin-purse", "1.0", ())
    assert not list(source.tree.rglob("*.pyc"))


async def test_links_are_left_out(tmp_path: Path) -> None:
    link = tarfile.TarInfo("coin_purse-1.0/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    source = await fetch(str(make_archive(tmp_path / "a.tar.gz", SOURCES, [link])), tmp_path)
    assert not (source.tree / "link").is_symlink()


@pytest.mark.parametrize("name", ["../outside", "coin_purse-1.0/../../outside"])
async def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", SOURCES, [tarfile.TarInfo(name)])
    with pytest.raises(TaskBuildError, match="outside"):
        await fetch(str(archive), tmp_path / "scratch")
    assert "outside" not in names_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.tar.gz", "could not be opened"),
        ("broken.zip", "not a zip file"),
        ("no package", "neither a file nor a requirement"),
    ],
)
async def test_nothing_to_unpack(tmp_path: Path, name: str, message: str) -> None:
    package = tmp_path / name
    if package.suffix:
        package.write_bytes(b"garbage")
    with pytest.raises(TaskBuildError, match=message) as caught:
        await fetch(str(package), tmp_path / "scratch")
    assert "\n" not in str(caught.value)


async def test_suite_is_reported(archive: Path, tmp_path: Path) -> None:
    source = await fetch(str(archive), tmp_path)
    runner = SuiteRunner(tmp_path)
    await runner.prepare(source.tree)
    run = await runner.run(source.tree, timeout_s=60, trace_calls=True)
    assert run.outcomes["tests/test_purse.py::test_change[0 [none]]"] == "passed"
    assert run.outcomes["tests/test_purse.py::test_has_no_network"] == "passed"
    assert set(run.outcomes) - run.passed == {"tests/test_purse.py::test_fails_always"}
    assert run.failures["tests/test_purse.py::test_fails_always"].message.startswith("assert False")
    called = {line for path, line in run.called if path == "coin_purse/words.py"}
    assert 4 in called
    assert 15 not in called
    assert list(source.tree.rglob("__pycache__")) == []


async def test_suite_that_does_not_end_is_killed(archive: Path, tmp_path: Path) -> None:
    source = await fetch(str(archive), tmp_path)
    runner = SuiteRunner(tmp_path)
    await runner.prepare(source.tree)
    endless = {"coin_purse/words.py": b"import subprocess, time\nsubprocess.Popen(['sleep', '4242'])\ntime.sleep(4242)\n"}
    run = await runner.run(source.tree, endless, timeout_s=3)
    assert run.problem == "the tests took longer than 3 s"
    assert not run.outcomes
    assert b"sleep\x004242\x00" not in running_commands()


async def test_suite_that_ends_the_process_has_no_report(archive: Path, tmp_path: Path) -> None:
    source = await fetch(str(archive), tmp_path)
    runner = SuiteRunner(tmp_path)
    await runner.prepare(source.tree)
    run = await runner.run(source.tree, {"coin_purse/words.py": b"import os\nos._exit(0)\n"}, timeout_s=60)
    assert run.problem is not None
    assert "without a report" in run.problem


async def test_failing_install_command(archive: Path, tmp_path: Path) -> None:
    source = await fetch(str(archive), tmp_path)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(TaskBuildError, match=r"'python -m pip install nowhere-to-be-found' failed: .*No matching distribution"):
        await SuiteRunner(tmp_path).prepare(source.tree, ["python -m pip install nowhere-to-be-found"], wheels)


async def test_box_shows_only_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "given").mkdir()
    box = Box(writable={"/given": tmp_path / "given"}, readable={})
    script = f"cat {tmp_path}/secret; ls /root /home; touch /usr/x; id -u; env; echo done > /given/file"
    result = await box.run(["/bin/sh", "-c", script], cwd="/given", timeout_s=20)
    assert result.exit_code == 0
    assert "No such file" in result.output
    assert "Read-only file system" in result.output
    assert "\n1000\n" in result.output
    assert (tmp_path / "given" / "file").read_text() == "done\n"


def test_rows(built: Path) -> None:
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


async def test_patch_makes_the_named_tests_pass(built: Path, tmp_path: Path) -> None:
    runner = SuiteRunner(tmp_path)
    tree = tmp_path / "tree"
    tree.mkdir()
    await runner.prepare(tree)
    for row in read_rows(built):
        git(repository_path(built, row.repo), f"--work-tree={tree}", "checkout", "--force", row.base_commit, "--", ".")
        before = await runner.run(tree, timeout_s=60)
        assert not before.passed & set(row.FAIL_TO_PASS)
        assert before.passed >= set(row.PASS_TO_PASS)
        apply(row.patch, tree)
        after = await runner.run(tree, timeout_s=60)
        assert after.passed >= {*row.FAIL_TO_PASS, *row.PASS_TO_PASS}


async def test_same_seed_same_tasks(built: Path, archive: Path, tmp_path: Path) -> None:
    await PackageBuilder(OPTIONS, lambda line: None).build(str(archive), tmp_path)
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
async def test_package_without_tasks(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", {**SOURCES, **changes})
    output = tmp_path / "output"
    output.mkdir()
    builder = TaskSetBuilder(OPTIONS, validate, lambda line: None)
    outcome = await builder.build(str(archive), output)
    assert outcome.kept == 0
    assert outcome.problem is not None
    assert message in outcome.problem
    assert list(output.iterdir()) == []


async def test_tasks_that_do_not_validate_are_dropped_without_a_trace(archive: Path, tmp_path: Path) -> None:
    """The validation is a stand-in that finds fault with one task; the real one runs in the test below."""

    async def find_fault(folder: Path, instance_ids: Sequence[str]) -> dict[str, str]:
        assert [row.instance_id for row in read_rows(folder)] == list(instance_ids)
        return {instance_ids[0]: "oracle scores 0, 0"}

    lines: list[str] = []
    outcome = await TaskSetBuilder(OPTIONS, find_fault, lines.append).build(str(archive), tmp_path)
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
    write_rows(tmp_path, [good, useless, solved])
    problems = await validate(tmp_path, [good.instance_id, "useless", "solved", "absent"])
    assert set(problems) == {"useless", "solved", "absent"}


def test_command_line(archive: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(root / "scripts" / "build_swe_tasks.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    (tmp_path / "taken").write_text("")
    done = run(str(archive), "--output", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"--output: {tmp_path} is not an empty directory\n"
    done = run("no such package", "--output", str(tmp_path / "new"))
    assert done.returncode == 1
    assert "neither a file nor a requirement" in done.stdout


PAYING = '''    @mark
    def test_pay(self, amount):
        """Pays."""
        purse = Purse()
        with raises(X):
            purse.pay(amount)
'''


def test_problem_statement() -> None:
    function = FunctionInfo("src/purse/change.py", "Purse.pay", 3, "pay(self, amount)", "Take coins out.")
    failures = {
        "tests/test_purse.py::TestPurse::test_pay[a b]": Failure(
            code=PAYING,
            parameters={"amount": "-1", "unused": "0"},
            message="Failed: DID NOT RAISE X in TestPurse\n at /workspace/repo/tests/x",
        ),
        "tests/test_purse.py::TestPurse::test_other": Failure(code="", parameters={}, message="ValueError: no"),
    }
    assert write_problem_statement([function], failures) == (
        "# Wrong results in connection with `Purse.pay`\n\n"
        "`purse.change.Purse.pay` (`pay(self, amount)`) does not do what its documentation says:\n\n"
        "> Take coins out.\n\n"
        "```\nValueError: no\n```\n\n"
        "```python\namount = -1\npurse = Purse()\nwith raises(X):\n    purse.pay(amount)\n```\n\n"
        "This ends with:\n\n"
        "```\nFailed: DID NOT RAISE X in example\n at tests/x\n```\n"
    )


@pytest.mark.parametrize(
    ("node_id", "expected"),
    [
        ("tests/a.py::test[a b]", True),
        ("tests/a.py::test[é]", True),
        ("tests/a.py::test[a\nb]", False),
        ("tests/a.py::test[/workspace/repo/x]", False),
        ("tests/a.py::test[<object object at 0x7f0]", False),
        ("README.md::README.md", False),
        ("coins/change.py::coins.change.make_change", False),
    ],
)
def test_usable_names(node_id: str, expected: bool) -> None:
    assert is_usable(node_id) is expected
