"""Which paths of a patch could decide the verdict instead of the fix."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

_TEST_CONFIGURATION = frozenset(
    {"conftest.py", "pytest.ini", ".pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml", "pytest.toml", ".pytest.toml"}
)
_INTERPRETER_HOOKS = frozenset({"sitecustomize.py", "usercustomize.py"})
_COMPILED = (".pyc", ".pyo", ".so", ".pyd", ".pth")
_TEST_FOLDERS = frozenset({"test", "tests", "testing"})
_PLUGIN_METADATA = (".dist-info", ".egg-info")
_RUNNER_MODULES = frozenset(
    {"pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli"}
)

_SYMBOLIC_LINK, _SUBMODULE = "120000", "160000"


@dataclass(frozen=True)
class Change:
    """One path that a patch changes: git's modes before and after, `000000` where there is nothing."""

    path: str
    old_mode: str
    new_mode: str

    @property
    def is_new(self) -> bool:
        """Whether the pristine tree has nothing there."""
        return self.old_mode == "000000"


@dataclass(frozen=True)
class Protection:
    """The paths of one task that a patch must leave alone; `test_files` are the files of the named tests."""

    test_files: frozenset[str]

    @classmethod
    def of_tests(cls, node_ids: Iterable[str]) -> Protection:
        """Protect the files that pytest node ids name, and everything that takes part in running them."""
        return cls(frozenset(posixpath.normpath(node_id.split("::", 1)[0]) for node_id in node_ids))

    @cached_property
    def _test_folders(self) -> tuple[str, ...]:
        """The outermost folder named like a test folder above each test file."""
        folders = set()
        for file in self.test_files:
            parts = PurePosixPath(file).parts[:-1]
            for depth, part in enumerate(parts, start=1):
                if part.lower() in _TEST_FOLDERS:
                    folders.add("/".join(parts[:depth]) + "/")
                    break
        return tuple(sorted(folders))

    def reason(self, change: Change) -> str | None:
        """Why a change is left out of grading; None if it counts."""
        path = PurePosixPath(change.path)
        name = path.name.lower()
        if change.new_mode in (_SYMBOLIC_LINK, _SUBMODULE):
            return "a link or submodule"
        if change.path in self.test_files or change.path.startswith(self._test_folders):
            return "a test or a helper of tests"
        if any(file.startswith(f"{change.path}/") for file in (*self.test_files, *self._test_folders)):
            return "in the place of a folder of tests"
        if name in _TEST_CONFIGURATION or name in _INTERPRETER_HOOKS:
            return "configuration of the test runner or the interpreter"
        if name.endswith(_COMPILED) or "__pycache__" in path.parts:
            return "compiled or imported without being source"
        if any(part.lower().endswith(_PLUGIN_METADATA) for part in path.parts):
            return "metadata that can register plugins"
        if ".git" in (part.lower() for part in path.parts) or name == ".gitattributes":
            return "part of git's own data"
        if change.is_new and self._shadows(path):
            return "shadows a module of the test runner or the standard library"
        return None

    def _shadows(self, path: PurePosixPath) -> bool:
        """Whether a new file can be imported under the name of a module that tests are run with.

        A module inside of a package, `package/json.py`, is another module; which folders are packages is not known here, so
        a new file counts as top-level at the root, in `src` and beside the tests.
        """
        if path.suffix != ".py":
            return False
        roots = {".", "src"} | {posixpath.dirname(file) or "." for file in self.test_files}
        for root in roots:
            if root == "." or path.is_relative_to(root):
                relative = path if root == "." else path.relative_to(root)
                module = relative.parts[0].split(".", 1)[0]
                if module in _RUNNER_MODULES or module in sys.stdlib_module_names:
                    return True
        return False
