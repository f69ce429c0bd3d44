"""Imports point one way: as the picture in docs/architecture.md shows it, which is the order of the rooms."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("hermes_envs", "backends", "sandbox_image")
PICTURE = ROOT / "docs" / "architecture.md"
ALLOWED = {
    "sandbox_image": {"sandbox_image", "aiohttp"},
    "backends": {"backends", "sandbox_image", "aiohttp", "pydantic"},
}
"""What a package may import beside the standard library. `hermes_envs` is the top and may import anything."""

Arrow = tuple[str, str]


def modules() -> dict[str, Path]:
    """All modules of the product by their dotted names; the demo's repositories are data."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if "repositories" not in path.relative_to(ROOT).parts[1:3] or "demo" not in path.parts:
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a file imports, wherever in it: each module with the names that are taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module), tuple(alias.name for alias in node.names)


# --- packages --------------------------------------------------------------------------------------------------------------


def violations(path: Path, package: str) -> set[str]:
    return {name.split(".")[0] for name, _ in imported(path)} - ALLOWED[package] - sys.stdlib_module_names


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


# --- rooms -----------------------------------------------------------------------------------------------------------------


class Picture:
    """The mermaid picture: rooms, each a folder or some modules at a package's door, and arrows from who imports to what."""

    def __init__(self, text: str) -> None:
        [drawn] = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
        self.room_of: dict[str, str] = {}
        self.arrows: set[Arrow] = set()
        package = ""
        for line in map(str.strip, drawn.splitlines()):
            if begun := re.fullmatch(r"subgraph (\w+)", line):
                package = begun[1]
            elif room := re.fullmatch(r'(\w+)\["(.+)"\]', line):
                for member in re.split(r",\s*(?:<br>)?", room[2]):
                    self.room_of[f"{package}.{member.rstrip('/')}" if member != "__init__" else package] = room[1]
            elif arrow := re.fullmatch(r"(\w+) --> (\w+(?: & \w+)*)", line):
                self.arrows |= {(arrow[1], target) for target in arrow[2].split(" & ")}

    def room(self, module: str) -> str | None:
        """The room of a module: its own, that of the folder it is in, or None if it is not drawn."""
        door = ".".join(module.split(".")[:2])
        return self.room_of.get(door)

    def below(self, room: str) -> set[str]:
        """The rooms that can be reached by arrows."""
        reached: set[str] = set()
        pending = [room]
        while pending:
            new = {target for source, target in self.arrows if source == pending[-1]} - reached
            pending.pop()
            reached |= new
            pending.extend(new)
        return reached


def arrows(picture: Picture, files: dict[str, Path]) -> dict[Arrow, str]:
    """The arrows between rooms that the imports make, each with one import as an example."""
    known = modules().keys()
    found: dict[Arrow, str] = {}
    for module, path in files.items():
        for name, members in imported(path):
            # `from package import module` takes a module, `from package import name` takes something of the package.
            taken = [f"{name}.{member}" if f"{name}.{member}" in known else name for member in members] or [name]
            for target in taken:
                if target in known and picture.room(target) != picture.room(module):
                    found[str(picture.room(module)), str(picture.room(target))] = f"{module} imports {target}"
    return found


@cache
def drawn() -> Picture:
    return Picture(PICTURE.read_text(encoding="utf-8"))


def test_every_module_has_a_room_and_every_room_a_module() -> None:
    picture = drawn()
    doors = {".".join(module.split(".")[:2]) for module in modules()}
    assert doors == set(picture.room_of), "docs/architecture.md: the picture shows other modules than there are"


def test_no_arrow_of_the_picture_leads_back() -> None:
    picture = drawn()
    assert [room for room in set(picture.room_of.values()) if room in picture.below(room)] == []


def test_imports_follow_the_arrows() -> None:
    picture = drawn()
    found = arrows(picture, modules())
    astray = [example for (source, target), example in found.items() if target not in picture.below(source)]
    assert astray == [], "an import against the order of the rooms in docs/architecture.md"
    assert picture.arrows - found.keys() == set(), "arrows of the picture that no import makes"


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("hermes_envs.serving.outbox", "from hermes_envs.env import AgentEnv"),
        ("hermes_envs.tools.call", "def f():\n    import hermes_envs.grading.patch"),
        ("hermes_envs.runs.summary", "from hermes_envs.serving import outbox"),
        ("sandbox_image.kernel.linux", "from sandbox_image.box.box import Box"),
    ],
)
def test_an_arrow_back_is_noticed(tmp_path: Path, module: str, planted: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(planted)
    [(source, target)] = arrows(drawn(), {module: path})
    assert target not in drawn().below(source)
