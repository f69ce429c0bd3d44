"""Waiting for what takes a moment, on a machine that may have other work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE_S = 180.0
"""When a test gives up what it waits for. A stop for what hangs: it says nothing about how long anything may take."""


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
