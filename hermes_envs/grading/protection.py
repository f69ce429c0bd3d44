"""Which paths of a patch could decide the verdict instead of the fix."""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

_TEST_CONFIGURATION = frozenset(
    {"pytest.ini", ".pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml", "pytest.toml", ".pytest.toml", ".coveragerc"}
)
# As modules or packages: both are imported by name.
_HOOK_MODULES = frozenset({"conftest", "sitecustomize", "usercustomize"})
_COMPILED = (".pyc", ".pyo", ".so", ".pyd", ".pth")
_TEST_WORDS = frozenset({"test", "tests", "testing", "unittest", "unittests", "testdata", "testcases"})
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
    """The paths of one task that a patch must leave alone.

    `test_files` are the files of the named tests, `solution_files` those that the reference solution changes, `base_files` all
    files of the pristine tree, and `installed` the modules of the environment that tests may import.
    """

    test_files: frozenset[str]
    solution_files: frozenset[str] = frozenset()
    base_files: frozenset[str] = frozenset()
    installed: frozenset[str] = frozenset()

    @classmethod
    def of_task(
        cls, node_ids: Iterable[str], solution: str, base_files: Iterable[str] = (), installed: Iterable[str] = ()
    ) -> Protection:
        """Protect the files that pytest node ids name, and everything that takes part in running them.

        `solution` is the reference patch: a folder that looks like one of tests may hold the code to be repaired.
        """
        tests = frozenset(posixpath.normpath(node_id.split("::", 1)[0]) for node_id in node_ids)
        changed = frozenset(re.findall(r"^(?:---|\+\+\+) [ab]/([^\t\n]+)", solution, re.MULTILINE))
        return cls(tests, changed - tests, frozenset(base_files), frozenset(installed))

    def reason(self, change: Change) -> str | None:
        """Why a change is left out of grading; None if it counts."""
        path = PurePosixPath(change.path)
        name = path.name.lower()
        if change.new_mode in (_SYMBOLIC_LINK, _SUBMODULE):
            return "a link or submodule"
        if change.path in self.test_files:
            return "a test"
        if change.path not in self.solution_files and any(map(_is_test_folder, path.parts[:-1])):
            return "a helper of tests"
        if any(file.startswith(f"{change.path}/") for file in self.test_files):
            return "in the place of a folder of tests"
        if any(f"{folder}.py" in self.test_files for folder in path.parents):
            return "a package in the place of a test"
        if name in _TEST_CONFIGURATION or any(part.lower().split(".", 1)[0] in _HOOK_MODULES for part in path.parts):
            return "configuration of the test runner or the interpreter"
        if name.endswith(_COMPILED) or "__pycache__" in path.parts:
            return "compiled or imported without being source"
        if any(part.lower().endswith(_PLUGIN_METADATA) for part in path.parts):
            return "metadata that can register plugins"
        if ".git" in (part.lower() for part in path.parts) or name == ".gitattributes":
            return "part of git's own data"
        if change.is_new and self._shadows(path):
            return "shadows a module that tests are run with"
        return None

    def _shadows(self, path: PurePosixPath) -> bool:
        """Whether a new file can be imported under the name of a module that tests are run with.

        It can at the root, in `src` and beside the tests, unless it lies in a package that was there before: `package/json.py`
        is another module than `json`.
        """
        if path.suffix != ".py":
            return False
        for root in {".", "src"} | {posixpath.dirname(file) or "." for file in self.test_files}:
            if root == "." or path.is_relative_to(root):
                relative = path if root == "." else path.relative_to(root)
                module = relative.parts[0].split(".", 1)[0]
                if self._is_taken(module) and posixpath.normpath(f"{root}/{module}") not in self._base_modules:
                    return True
        return False

    def _is_taken(self, module: str) -> bool:
        known = module in _RUNNER_MODULES or module in sys.stdlib_module_names or module in self.installed
        return known or module in self._test_packages

    @cached_property
    def _test_packages(self) -> frozenset[str]:
        """What tests may import each other's helpers by."""
        return frozenset(PurePosixPath(file).parts[0].removesuffix(".py") for file in self.test_files)

    @cached_property
    def _base_modules(self) -> frozenset[str]:
        """Every folder and every module of the pristine tree, without the ending."""
        modules = {file.removesuffix(".py") for file in self.base_files}
        return frozenset(modules | {str(parent) for file in self.base_files for parent in PurePosixPath(file).parents})


def _is_test_folder(name: str) -> bool:
    return not _TEST_WORDS.isdisjoint(re.split(r"[_\-.]+", name.lower()))
