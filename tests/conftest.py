"""What holds for all tests: where their temporary files are, and that nothing is left of them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.leftovers import leftovers

# Read when the libraries are imported: no test asks a hub, and none waits for one that cannot be reached.
os.environ["HF_HUB_OFFLINE"] = "1"


MADE = pytest.StashKey[Path]()
"""The directory of this run, if this process has made it."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep all files of a run below one directory with a short path: that of a unix socket may have 107 bytes.

    Each worker of pytest-xdist has a temporary directory of its own in it.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        run = Path(tempfile.mkdtemp(prefix="t-"))
        # Slots and servers may run as other users.
        run.chmod(0o755)
        config.option.basetemp = config.option.basetemp or str(run / "pytest")
        config.stash[MADE] = run
    else:
        run = Path(os.environ["TMPDIR"]).parent
    temporary = run / (worker or "main")
    temporary.mkdir()
    temporary.chmod(0o1777)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("heavy") is None)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the directory of the run, unless there is a failure to look into."""
    if session.testsfailed == 0 and MADE in session.config.stash:
        # Workers that are just ending remove some of it themselves.
        shutil.rmtree(session.config.stash[MADE], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail with the last test if processes, mounts or temporary files outlive the tests."""
    folders = [Path(tempfile.gettempdir()), tmp_path_factory.getbasetemp()]
    yield
    deadline = time.monotonic() + 30
    while (left := leftovers(*folders)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == [], "\n".join(left)
