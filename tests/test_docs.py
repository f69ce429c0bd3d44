"""The code of the guides is run as a reader would run it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the tutorial's files, which is the working directory."""
    environment, test = blocks("new_environment.md", "python")
    [rows] = blocks("new_environment.md", "jsonl")
    (tmp_path / "words").mkdir()
    for name, content in (("words.py", environment), ("test_words.py", test), ("words/tasks.jsonl", rows)):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in ("words", "test_words"):
        sys.modules.pop(module, None)


def test_the_tutorials_environment_from_the_command_line(tutorial: Path) -> None:
    flags = ("--env.dataset_name=words", "--env.policy=oracle", "--env.use_wandb=false", "--env.local_slots=2")
    for command, score in (("process", "1.000"), ("evaluate", "1.000")):
        done = subprocess.run([sys.executable, "words.py", command, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"mean score +│ {score}", done.stdout), done.stdout
    assert (tutorial / "data/words.jsonl").exists()


def test_the_tutorials_own_test(tutorial: Path) -> None:
    module: ModuleType = importlib.import_module("test_words")
    module.test_the_reference_is_paid()
    module.test_doing_nothing_is_not()


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    [example] = blocks("../README.md", "python")
    (tmp_path / "sum_env.py").write_text(example)
    flags = ("--env.policy=oracle", "--env.use_wandb=false", "--env.total_steps=1", "--env.group_size=2", "--env.local_slots=2")
    command = [sys.executable, "sum_env.py", "process", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"mean score +│ 1\.000", done.stdout), done.stdout


def run_guide(example: str, folder: Path, stdin: str = "") -> str:
    """Run an example of docs/debugging.md as a script; what it prints."""
    path = folder / "example.py"
    path.write_text(example)
    done = subprocess.run([sys.executable, str(path)], cwd=folder, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_rollout_by_hand(tmp_path: Path) -> None:
    printed = run_guide(blocks("debugging.md", "python")[0], tmp_path)
    assert "Score(value=1.0" in printed
    assert "calls {'name': 'terminal'" in printed


def test_a_slot_to_look_into(tmp_path: Path) -> None:
    printed = run_guide(blocks("debugging.md", "python")[1], tmp_path, "pwd; git log --oneline | wc -l\nexit 3\n")
    assert printed.split() == ["/workspace/repo", "1", "0", "exit", "status", "3", "3"]
