from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.rollout_api import RolloutApi
from tests.train.walker import make_walker


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK has no other switch for it."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="session")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer and a tiny model's options."""
    folder = tmp_path_factory.mktemp("walker")
    make_walker(folder)
    return folder


@pytest_asyncio.fixture
async def run_api(tmp_path: Path) -> AsyncIterator[RolloutApi]:
    """A `run-api` of its own."""
    async with RolloutApi(tmp_path / "api.log") as api:
        yield api
