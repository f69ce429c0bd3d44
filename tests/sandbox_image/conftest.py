"""Servers that the tests of a file share."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.sandbox_image.running import Api, RunningServer, new_marker, running
from tests.support.users import ORDINARY_USER, USERS, drop, is_superfluous

if shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=USERS)
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server with two slots; the ordinary user's has the Python init, the other one the compiled init if there is one."""
    with running(other_user=request.param == ORDINARY_USER) as server:
        yield server


@pytest_asyncio.fixture
async def visitor(server: RunningServer) -> AsyncIterator[Api]:
    """A client that takes the slots as it finds them."""
    api = Api.over(server)
    async with api.session:
        yield api


@pytest_asyncio.fixture
async def api(server: RunningServer) -> AsyncIterator[Api]:
    """A client of a slot with an empty workspace."""
    api = Api.over(server)
    async with api.session:
        await api.reset()
        yield api


@pytest.fixture
def marker() -> str:
    """A duration that no other process sleeps for."""
    return new_marker()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Ask an ordinary user's server nothing that is the same for any user."""
    drop(config, items, lambda item: is_superfluous(item, "server"))
