"""Finishing what must be finished although the caller is being cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def finish(awaitable: Awaitable[Result]) -> Result:
    """Await to the end, however often the caller is cancelled meanwhile.

    `asyncio.shield` alone lets the work go on but returns at once, and the event loop may be closed before it is done.

    Raises:
        asyncio.CancelledError: the caller was cancelled; raised only after the work is done.
        Exception: whatever the work raised.
    """
    task = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()
