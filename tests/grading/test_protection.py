from __future__ import annotations

import pytest

from hermes_envs.grading.protection import Change, Protection

PROTECTION = Protection.of_tests(
    ["tests/unit/test_a.py::test_x[a::b]", "pkg/test_beside.py::T::test_y", "test_root.py::test_z"]
)


def change(path: str, old: str = "100644", new: str = "100644") -> Change:
    return Change(path, old, new)


def added(path: str) -> Change:
    return change(path, old="000000")


@pytest.mark.parametrize(
    "allowed",
    [
        change("pkg/core.py"),
        change("src/pkg/testing_tools.py"),
        change("README.md"),
        change("json.py"),
        added("other/json.py"),
        added("src/pkg/types.py"),
        added("pkg/new_module.py"),
        added("docs/statistics.md"),
        change("pkg/deleted.py", new="000000"),
        added("contest.py"),
    ],
    ids=lambda allowed: allowed.path,
)
def test_source_may_change(allowed: Change) -> None:
    assert PROTECTION.reason(allowed) is None


@pytest.mark.parametrize(
    "protected",
    [
        change("tests/unit/test_a.py"),
        change("tests/helpers.py"),
        added("tests/new.py"),
        change("tests/data/expected.json", new="000000"),
        change("pkg/test_beside.py"),
        change("test_root.py", new="000000"),
        added("tests"),
        added("conftest.py"),
        added("pkg/deep/conftest.py"),
        added("CONFTEST.py"),
        change("pyproject.toml"),
        added("setup.cfg"),
        added("src/sitecustomize.py"),
        added("x.pth"),
        added("pkg/__pycache__/core.cpython-311.pyc"),
        added("pkg/core.so"),
        added("evil.egg-info/entry_points.txt"),
        added("src/evil-1.dist-info/METADATA"),
        added(".gitattributes"),
        added("pkg/.git/config"),
        added("pytest.py"),
        added("src/_pytest/__init__.py"),
        added("json.py"),
        added("pkg/random.py"),
        change("pkg/link", new="120000"),
        added("vendored"),
    ],
    ids=lambda protected: protected.path,
)
def test_what_could_decide_the_verdict_may_not(protected: Change) -> None:
    if protected.path == "vendored":
        protected = Change("vendored", "000000", "160000")
    if protected.path == "pkg/random.py":
        # Beside a test, a folder is an import root.
        assert "shadows" in str(PROTECTION.reason(protected))
    assert PROTECTION.reason(protected) is not None
