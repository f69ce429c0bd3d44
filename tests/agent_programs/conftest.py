"""What the tests of terminals for agent programs share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import BackendOptions
from hermes_envs.agent_programs.pool import TerminalPool

# Read when mini-swe-agent is imported: no banner, and nothing of the user's own configuration.
os.environ["MSWEA_SILENT_STARTUP"] = "1"


@pytest.fixture(scope="session", autouse=True)
def configuration_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """mini-swe-agent makes a directory for its configuration when it is imported."""
    os.environ["MSWEA_GLOBAL_CONFIG_DIR"] = str(tmp_path_factory.mktemp("mini-swe-agent"))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[TerminalPool]:
    """Four slots; nothing may be left of them."""
    pool = TerminalPool(BackendOptions(local_slots=4, local_data_dir=str(tmp_path)))
    yield pool
    pool.close()
    assert list(tmp_path.iterdir()) == []
