"""Imports point one way: hermes_envs -> backends -> sandbox_image."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "sandbox_image": {"sandbox_image", "aiohttp"},
    "backends": {"backends", "sandbox_image", "aiohttp", "pydantic"},
}
"""What a package may import beside the standard library. `hermes_envs` is the top and may import anything."""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


def violations(path: Path, package: str) -> set[str]:
    return imported(path) - ALLOWED[package] - sys.stdlib_module_names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_stay_below(package: str) -> None:
    found = {path.name: violations(path, package) for path in (ROOT / package).rglob("*.py")}
    assert found, f"no modules in {package}"
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize("planted", ["import hermes_envs", "from backends.base import Slot", "def f():\n    import requests"])
def test_an_upward_import_is_noticed(tmp_path: Path, planted: str) -> None:
    module = tmp_path / "module.py"
    module.write_text(planted)
    assert violations(module, "sandbox_image")
