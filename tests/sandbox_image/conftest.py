"""Servers that the tests of a file share."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.sandbox_image.running import Api, RunningServer, running

if shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=["own user", "ordinary user"])
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server with two slots, as whoever runs the tests and, if that is root, as an ordinary user as well."""
    with running(other_user=request.param == "ordinary user") as server:
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
