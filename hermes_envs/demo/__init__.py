"""The tasks that ship with the package: small libraries written for this, each with several bugs.

`repositories/NAME` is a library as it should be. `bugs/NAME` has for each bug the patch that puts it in (`BUG.patch`), the
issue that a user might have written about it (`BUG.md`) and which tests tell (`BUG.json`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hermes_envs.task_building.task_folder import TaskRow, add_rows, appearing_at, repository_path
from hermes_envs.task_building.task_repository import TaskRepository

OWNER = "demo"
_HERE = Path(__file__).parent
_FORMAT = "1"
"""Part of the folder's name: raised whenever the same sources would give another folder."""


@dataclass(frozen=True)
class DemoBug:
    """One bug of one repository; the paths are inside of the package."""

    repository: str
    name: str

    @property
    def instance_id(self) -> str:
        return f"{OWNER}__{self.repository}.{self.name}"

    @property
    def repo(self) -> str:
        return f"{OWNER}/{self.repository}"

    @property
    def sources(self) -> Path:
        """The repository without any bug."""
        return _HERE / "repositories" / self.repository

    @property
    def patch(self) -> Path:
        """The git diff that puts the bug in."""
        return self._file("patch")

    @property
    def issue(self) -> Path:
        return self._file("md")

    @property
    def tests(self) -> Path:
        """`{"FAIL_TO_PASS": [...], "PASS_TO_PASS": [...]}`, written by scripts/record_demo_tests.py."""
        return self._file("json")

    def _file(self, suffix: str) -> Path:
        # `with_suffix` would cut names with a dot.
        return _HERE / "bugs" / self.repository / f"{self.name}.{suffix}"


def bugs() -> list[DemoBug]:
    """All bugs, in a fixed order."""
    return [DemoBug(patch.parent.name, patch.stem) for patch in sorted((_HERE / "bugs").glob("*/*.patch"))]


def materialise(directory: Path) -> Path:
    """Write the tasks as a folder that `swe_smith` reads, below `directory`, and return it.

    The folder is named after its contents: it is made once, and anew when the package's tasks have changed. Commit ids are the
    same everywhere. Needs git and no network.

    Raises:
        TaskBuildError: git is missing or fails.
        OSError: the folder cannot be written.
    """
    folder = directory / f"tasks-{_digest()}"
    if not folder.is_dir():
        with appearing_at(folder) as new:
            _write(new)
    return folder


def _write(folder: Path) -> None:
    by_repository: dict[str, list[DemoBug]] = {}
    for bug in bugs():
        by_repository.setdefault(bug.repository, []).append(bug)
    rows = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for name, bugs_of_one in by_repository.items():
            repository = TaskRepository(Path(scratch) / name)
            clean = repository.add_tree(bugs_of_one[0].sources)
            rows += [_row(bug, repository, clean) for bug in bugs_of_one]
            repository.publish(repository_path(folder, bugs_of_one[0].repo))
    add_rows(folder, rows)


def _row(bug: DemoBug, repository: TaskRepository, clean: str) -> TaskRow:
    buggy = repository.patched_tree(clean, bug.patch.read_bytes())
    tests = json.loads(bug.tests.read_text(encoding="utf-8"))
    return TaskRow(
        instance_id=bug.instance_id,
        repo=bug.repo,
        base_commit=repository.add_task(bug.instance_id, buggy),
        problem_statement=bug.issue.read_text(encoding="utf-8"),
        patch=repository.diff(buggy, clean),
        FAIL_TO_PASS=tests["FAIL_TO_PASS"],
        PASS_TO_PASS=tests["PASS_TO_PASS"],
    )


def _digest() -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for path in _files():
        digest.update(f"\0{path.relative_to(_HERE).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _files() -> Iterator[Path]:
    for folder in ("bugs", "repositories"):
        for path in sorted((_HERE / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path
