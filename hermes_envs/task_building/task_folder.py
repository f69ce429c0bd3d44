"""The folder in which a set of tasks is kept: rows, repositories, wheels."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

TASKS_FILE = "tasks.jsonl"
REPOSITORIES = "repositories"
WHEELS = "wheels"


@dataclass(frozen=True)
class TaskRow:
    """One task, with the columns of SWE-smith's data sets and `install_commands`.

    `patch` is the fix: it applies to `base_commit`. `repo` is `OWNER/NAME`. `install_commands` run once in the repository, with
    the task's virtual environment first on PATH.
    """

    instance_id: str
    repo: str
    base_commit: str
    problem_statement: str
    patch: str
    FAIL_TO_PASS: list[str]
    PASS_TO_PASS: list[str]
    install_commands: list[str] = field(default_factory=list)
    text: str = ""


def add_rows(folder: Path, rows: Sequence[TaskRow]) -> None:
    """Add rows to those of a folder, one JSON object a line."""
    with (folder / TASKS_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def repository_path(folder: Path, repo: str) -> Path:
    """Where a folder keeps the repository `OWNER/NAME`."""
    return folder / REPOSITORIES / f"{repo}.git"


@contextmanager
def appearing_at(folder: Path) -> Iterator[Path]:
    """A new directory that gets its name only when the block has ended well: nobody ever sees half of it.

    If the name is taken by then, by a process that made the same, what is there stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        new = scratch / folder.name
        new.mkdir()
        yield new
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch)
