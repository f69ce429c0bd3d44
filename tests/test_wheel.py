"""The wheel has everything that it needs, and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(directory: Path, path: Path, *arguments: str) -> str:
    """Run Python where nothing of the checkout is on the path before `path`."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The wheel, unpacked as an installer would."""
    code = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    run(ROOT, ROOT, "-c", code, str(tmp_path))
    [archive] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path / "installed")
    return tmp_path / "installed"


def test_the_demo_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    located = run(elsewhere, wheel, "-c", "import hermes_envs, backends, sandbox_image; print(hermes_envs.__file__)")
    assert located.strip().startswith(str(wheel))
    options = ("--config", "swe_smith_demo.yaml", "--env.max_items", "1", "--env.group_size", "1", "--env.local_slots", "1")
    output = run(elsewhere, wheel, "-m", "hermes_envs.swe_smith", "process", *options)
    assert "1.000" in output
    assert (elsewhere / "data/swe_smith_demo.jsonl").stat().st_size > 0
    assert (elsewhere / "data/swe_smith_demo.html").stat().st_size > 0


def test_the_wheel_has_no_tests_and_no_leftovers(wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir() if "dist-info" not in path.name} == {
        "hermes_envs",
        "backends",
        "sandbox_image",
    }
    assert not list(wheel.rglob("__pycache__"))
    for needed in (
        "sandbox_image/Dockerfile",
        "hermes_envs/configs/swe_smith.yaml",
        "hermes_envs/maths/problems.jsonl",
        "hermes_envs/placeholder_tokenizer/tokenizer.json",
    ):
        assert (wheel / needed).is_file(), needed
