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
    else:
        run = Path(os.environ["TMPDIR"]).parent
    temporary = run / (worker or "main")
    temporary.mkdir()
    temporary.chmod(0o1777)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remove the directory of the run, unless there is a failure to look into."""
    if exitstatus == pytest.ExitCode.OK and "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(Path(tempfile.gettempdir()).parent)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail with the last test if processes, mounts or temporary files outlive the tests."""
    folders = [Path(tempfile.gettempdir()), tmp_path_factory.getbasetemp()]
    yield
    deadline = time.monotonic() + 30
    while (left := leftovers(*folders)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == [], "\n".join(left)
