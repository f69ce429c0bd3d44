"""A repository with one bug, small enough to be read beside the attacks on it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

FIXED = """\
def mean(values):
    return sum(values) / len(values)


def spread(values):
    return max(values) - min(values)
"""
BUGGY = FIXED.replace("/ len(values)", "/ (len(values) + 1)")
TESTS = """\
import pytest

from calc.core import mean, spread


@pytest.mark.parametrize("values, expected", [([1, 3], 2), ([2, 2, 2], 2)], ids=["two values", "three [equal] values"])
def test_mean(values, expected):
    assert mean(values) == expected


def test_spread(spread_of):
    assert spread([1, 4]) == spread_of
"""
CONFTEST = """\
import pytest


@pytest.fixture
def spread_of():
    return 3
"""
FILES = {
    "calc/__init__.py": "",
    "calc/core.py": BUGGY,
    "tests/conftest.py": CONFTEST,
    "tests/test_core.py": TESTS,
    "pytest.ini": "[pytest]\naddopts = -ra\n",
    ".gitignore": "__pycache__/\n",
}
SOLUTION = """\
diff --git a/calc/core.py b/calc/core.py
--- a/calc/core.py
+++ b/calc/core.py
@@ -1,5 +1,5 @@
 def mean(values):
-    return sum(values) / (len(values) + 1)
+    return sum(values) / len(values)
 
 
 def spread(values):
"""
FAIL_TO_PASS = ["tests/test_core.py::test_mean[two values]", "tests/test_core.py::test_mean[three [equal] values]"]
PASS_TO_PASS = ["tests/test_core.py::test_spread"]


def git(directory: Path, *arguments: str) -> str:
    """Run git with an identity of its own."""
    environment = {
        **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
    }
    done = subprocess.run(
        ["git", *arguments],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def write_task_folder(folder: Path, *, rows: int = 1, files: dict[str, str] | None = None, **overrides: object) -> Path:
    """A folder as `dataset_name` takes it, with `rows` tasks that are alike; `overrides` replace columns.

    `files` are in the repository beside its own.
    """
    work = folder / "work"
    for name, content in {**FILES, **(files or {})}.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(content)
    git(work, "init", "--quiet", "--initial-branch=main")
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "-m", "the buggy tree")
    (folder / "repositories/small").mkdir(parents=True)
    git(folder, "clone", "--quiet", "--bare", "work", "repositories/small/calc.git")
    row = {
        "repo": "small/calc",
        "base_commit": git(work, "rev-parse", "HEAD"),
        "problem_statement": "The mean of a list of numbers comes out too small.",
        "text": "",
        "patch": SOLUTION,
        "FAIL_TO_PASS": FAIL_TO_PASS,
        "PASS_TO_PASS": PASS_TO_PASS,
        "install_commands": [],
        **overrides,
    }
    lines = [json.dumps({"instance_id": f"small__calc.{number}", **row}) for number in range(rows)]
    (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    return folder
