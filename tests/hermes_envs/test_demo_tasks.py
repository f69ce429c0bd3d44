"""The shipped tasks: what the package says about each bug is what its tests say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import hermes_envs
from backends.local import LocalBackend, LocalOptions
from hermes_envs.demo import DemoBug, bugs, materialise
from hermes_envs.demo.recording import observe_tests
from hermes_envs.errors import TaskBuildError
from hermes_envs.task_building.task_folder import repository_path
from tests.support.task_rows import read_rows

BUGS = bugs()


def git(repository: Path, *arguments: str, cwd: Path | None = None) -> str:
    command = ["git", f"--git-dir={repository}", *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialise(tmp_path_factory.mktemp("demo"))


def test_there_is_enough_of_everything() -> None:
    per_repository = Counter(bug.repository for bug in BUGS)
    assert len(per_repository) >= 4
    assert min(per_repository.values()) >= 5
    for repository in per_repository:
        changed = [bug.patch.read_text().count("diff --git") for bug in BUGS if bug.repository == repository]
        assert min(changed) == 1
        assert max(changed) > 1


async def test_tests_tell_of_each_bug_as_recorded() -> None:
    """Runs every suite without and with every bug."""
    async with LocalBackend(LocalOptions(local_slots=2)) as backend:
        observed = await observe_tests(backend)
    for bug in BUGS:
        recorded = json.loads(bug.tests.read_text())
        assert observed[bug] == recorded, f"{bug.instance_id}: run scripts/record_demo_tests.py"
        assert recorded["FAIL_TO_PASS"]
        assert recorded["PASS_TO_PASS"]


def test_awkward_test_names_are_among_them() -> None:
    named = [node_id for bug in BUGS for node_id in json.loads(bug.tests.read_text())["FAIL_TO_PASS"]]
    assert any(" " in node_id for node_id in named)
    assert any(node_id.count("[") > 1 for node_id in named)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.instance_id)
def test_issue_is_a_report(bug: DemoBug) -> None:
    issue = bug.issue.read_text()
    assert issue.startswith("# ")
    assert len(issue.splitlines()) > 3
    for node_id in json.loads(bug.tests.read_text())["FAIL_TO_PASS"]:
        assert node_id.split("::")[1].split("[")[0] not in issue


def test_rows(folder: Path) -> None:
    rows = read_rows(folder)
    assert [row.instance_id for row in rows] == [bug.instance_id for bug in BUGS]
    for row in rows:
        assert row.repo.split("/")[0] == "demo"
        assert row.install_commands == []
        assert not set(row.FAIL_TO_PASS) & set(row.PASS_TO_PASS)
        assert (folder / "repositories" / f"{row.repo}.git").is_dir()


def test_the_patch_is_what_separates_a_task_from_the_library(folder: Path, tmp_path: Path) -> None:
    for row, bug in zip(read_rows(folder), BUGS, strict=True):
        tree = tmp_path / row.instance_id
        tree.mkdir()
        git(repository_path(folder, row.repo), f"--work-tree={tree}", "checkout", "--force", row.base_commit, "--", ".")
        assert files_of(tree) != files_of(bug.sources)
        subprocess.run(["git", "apply", "-"], input=row.patch, cwd=tree, check=True, text=True)
        assert files_of(tree) == files_of(bug.sources)


def test_history_does_not_hold_the_answer(folder: Path) -> None:
    for row, bug in zip(read_rows(folder), BUGS, strict=True):
        repository = repository_path(folder, row.repo)
        assert git(repository, "rev-list", f"refs/heads/{row.instance_id}").split() == [row.base_commit]
        commits = git(repository, "rev-list", "--all").split()
        assert len(commits) == sum(other.repository == bug.repository for other in BUGS)


def test_same_everywhere_and_made_once(folder: Path, tmp_path: Path) -> None:
    again = materialise(tmp_path)
    assert again.name == folder.name
    assert (again / "tasks.jsonl").read_bytes() == (folder / "tasks.jsonl").read_bytes()
    before = again.stat().st_mtime_ns
    assert materialise(tmp_path) == again
    assert again.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [again.name]


def test_the_users_own_git_configuration_takes_no_part(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    settings = "[core]\nautocrlf = true\n[init]\ndefaultBranch = x\n[user]\nname = Someone\n[diff]\nnoprefix = true\n"
    (home / ".gitconfig").write_text(settings)
    program = "import sys; from pathlib import Path; from hermes_envs.demo import materialise; materialise(Path(sys.argv[1]))"
    environment = {**os.environ, "HOME": str(home), "TZ": "Asia/Tokyo", "GIT_AUTHOR_DATE": "2001-01-01T00:00:00Z"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "demo")], env=environment, check=True)
    assert (tmp_path / "demo" / folder.name / "tasks.jsonl").read_bytes() == (folder / "tasks.jsonl").read_bytes()


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TaskBuildError, match="git is not installed"):
        materialise(tmp_path / "demo")
    assert list((tmp_path / "demo").iterdir()) == []


def test_the_demo_is_one_task_set_of_many() -> None:
    """Nothing but the environment that offers it imports it: what builds and reads task sets works without."""
    package = Path(hermes_envs.__file__).parent
    modules = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    importers = {name for name, text in modules.items() if "hermes_envs.demo" in text and not name.startswith("demo/")}
    assert importers == {"swe_smith.py"}
