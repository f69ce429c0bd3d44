"""What `hermes-envs doctor` says: of this machine, of one where an ordinary user asks, and of one without bubblewrap."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox_image.box.defences import BASICS, REMEDIES
from tests.sandbox_image.running import as_other_user, environment, open_directory

CONTROL_GROUPS = {"memory_limit", "process_count_limit", "processor_shares"}


def doctor(*options: str, prefix: list[str] | None = None, **changes: str) -> tuple[int, str]:
    """Exit status and output."""
    command = [*(prefix or [sys.executable]), "-P", "-m", "hermes_envs", "doctor", *options]
    variables = {**environment(), "COLUMNS": "200", **changes}
    ended = subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert ended.stderr == ""
    return ended.returncode, ended.stdout


def findings(report: str) -> dict[str, dict[str, Any]]:
    """By name."""
    return {finding["name"]: finding for finding in json.loads(report)["findings"]}


def test_this_machine(tmp_path: Path) -> None:
    status, said = doctor("--json", "--data-dir", str(tmp_path))
    found = findings(said)
    assert (status, json.loads(said)["well"]) == (0, True)
    assert set(REMEDIES) | {"Python", "bwrap", "git", "tmux", "slot server", "overlays", "control groups"} <= set(found)
    assert {name for name, finding in found.items() if finding["required"]} == {
        *BASICS,
        "Python",
        "bwrap",
        "git",
        "slot server",
    }
    assert all(finding["holds"] for finding in found.values() if finding["required"])
    assert os.listdir(tmp_path) == []


def test_an_ordinary_user_who_requires_more() -> None:
    with open_directory(other_user=True) as directory:
        # The server that it starts finds what is installed by way of the virtual environment's interpreter.
        prefix = [*as_other_user(directory)[:-1], sys.executable]
        status, said = doctor("--require", "user_per_slot", "--data-dir", str(directory), prefix=prefix)
    assert status == 1
    assert "missing  user_per_slot" in said
    assert "user_per_slot: run the server as root" in said
    assert said.endswith("something required is missing\n")


def test_without_bubblewrap(tmp_path: Path) -> None:
    git = shutil.which("git")
    assert git is not None
    (tmp_path / "git").symlink_to(git)
    status, said = doctor("--json", PATH=str(tmp_path))
    found = findings(said)
    assert status == 1
    assert (found["bwrap"]["holds"], found["git"]["holds"], found["tmux"]["holds"]) == (False, True, False)
    assert "apt-get install bubblewrap" in found["bwrap"]["remedy"]
    assert "bubblewrap is not installed" in found["slot server"]["detail"]


@pytest.mark.parametrize("options", [[], ["doctor", "--require", "luck"], ["surgeon"]])
def test_wrong_commands(options: list[str]) -> None:
    command = [sys.executable, "-P", "-m", "hermes_envs", *options]
    ended = subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: hermes-envs")
