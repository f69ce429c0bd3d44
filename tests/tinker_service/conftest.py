from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from transformers import PreTrainedTokenizerFast

from tests.hermes_envs.conftest import tokenizer

if TYPE_CHECKING:
    from tests.tinker_service.clients import Client

__all__ = ["tokenizer"]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK has no other switch for it."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest_asyncio.fixture
async def client(tokenizer: PreTrainedTokenizerFast) -> AsyncIterator[Client]:
    """A session with a service of its own."""
    # Not at the top: the tests that use it are skipped without torch and the SDK.
    from tests.tinker_service.clients import client_of_new_service

    async with client_of_new_service(tokenizer) as client:
        yield client
