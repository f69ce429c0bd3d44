"""What can be imported from `hermes_envs` itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hermes_envs


def test_every_name_is_there_and_mypy_sees_the_same_ones() -> None:
    tree = ast.parse(Path(str(hermes_envs.__file__)).read_text())
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(hermes_envs.__all__)
    # A type of options has no name of its own.
    assert all(getattr(hermes_envs, name).__name__ == name for name in hermes_envs.__all__ if name != "Names")
    assert set(hermes_envs.__all__) <= set(dir(hermes_envs))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Agents'"):
        hermes_envs.Agents  # noqa: B018


def test_importing_it_loads_nothing() -> None:
    source = "import hermes_envs, sys; print(sorted(name for name in sys.modules if name.startswith('hermes_envs.')))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
