from __future__ import annotations

import pytest

from hermes_envs.grading.protection import Change, Protection

PROTECTION = Protection.of_task(
    ["tests/unit/test_a.py::test_x[a::b]", "pkg/test_beside.py::T::test_y", "test_root.py::test_z"],
    solution="--- a/lib/testing/core.py\n+++ b/lib/testing/core.py\n--- a/test_root.py\n",
    base_files=[
        "tests/unit/test_a.py",
        "pkg/test_beside.py",
        "test_root.py",
        "pygments/lexer.py",
        "pkg/core.py",
        "src/pkg/core.py",
    ],
    installed=["hypothesis", "numpy", "pkg"],
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
        change("lib/testing/core.py"),
        added("pygments/new_lexer.py"),
        added("pkg/new.py"),
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
        added("sitecustomize/__init__.py"),
        added("src/UserCustomize/x.py"),
        added("conftest/__init__.py"),
        added("test_root/__init__.py"),
        added("pkg/test_beside/__init__.py"),
        added("hypothesis/__init__.py"),
        added("src/numpy.py"),
        added("src/tests/__init__.py"),
        change("lib/unit_tests/helper.py"),
        change("lib/testing/other.py"),
        change(".coveragerc"),
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
