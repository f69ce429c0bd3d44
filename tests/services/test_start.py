"""What programs import before they do anything: the libraries of training would make each of them start seconds later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.services import CHECKOUT

HEAVY = ["atroposlib", "datasets", "openai", "renderers", "torch", "transformers", "wandb"]
SHOW_HELP = """
import runpy, sys
module = sys.argv.pop(1)
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0
"""
IMPORT = "import importlib, sys; importlib.import_module(sys.argv[1])"
COUNT = f"\nprint('imported:', *(name for name in {HEAVY} if name in sys.modules))"


def run(program: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program + COUNT, *arguments],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["hermes_envs.tool_server", "hermes_envs.tool_executor_server"])
def test_a_service_shows_its_help_without_the_libraries_of_training(module: str) -> None:
    said = run(SHOW_HELP, module, "--help")
    assert said.endswith("imported:\n"), said
    # Types and defaults; secrets have no flag.
    assert "--max-request-bytes int" in said
    assert "(default: 16777216)" in said
    assert "-token" not in said.partition("options:")[2]


@pytest.mark.parametrize("name", ["variables", "mini_swe_agent"])
def test_terminals_need_no_libraries_of_training(name: str, tmp_path: Path) -> None:
    # mini-swe-agent makes a directory and shows a banner when it is imported.
    quiet = {"MSWEA_SILENT_STARTUP": "1", "MSWEA_GLOBAL_CONFIG_DIR": str(tmp_path)}
    said = run(IMPORT, f"hermes_envs.agent_programs.{name}", **quiet)
    assert said.endswith("imported:\n"), said


def test_a_heavy_import_is_noticed() -> None:
    assert run(IMPORT, "wandb") == "imported: wandb\n"
