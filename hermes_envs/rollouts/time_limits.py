"""Wall times of a rollout and its phases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hermes_envs.errors import PhaseTimeoutError


def time_limit(seconds: float) -> float:
    """So many seconds from now, as a time of the running event loop."""
    return asyncio.get_running_loop().time() + seconds


@asynccontextmanager
async def phase_limit(phase: str, seconds: float) -> AsyncIterator[None]:
    """Limit the length of a block.

    Raises:
        PhaseTimeoutError: it took longer.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as reason:
        if not limit.expired():
            raise
        raise PhaseTimeoutError(f"{phase} took longer than {seconds:g} s") from reason
