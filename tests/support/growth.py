"""How the time of work grows with its size, measured by ratios, so that no machine is too slow or too busy."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable

REPEATS = 5
STEP = 10
MOST = 3 * STEP
"""Linear work takes ten times as long for ten times as much, quadratic work a hundred times."""


def growth(prepare: Callable[[int], Callable[[], object]], size: int) -> float:
    """How many times longer work on `STEP * size` takes than on `size`; `prepare` makes the work, which is measured alone.

    What counts is the least processor time of this thread in a few tries.
    """
    return _least(prepare, STEP * size) / _least(prepare, size)


def _least(prepare: Callable[[int], Callable[[], object]], size: int) -> float:
    times = []
    gc.collect()
    for _ in range(REPEATS):
        work = prepare(size)
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


async def slowest(
    work: Callable[[], Awaitable[object]], *, during: asyncio.Task[object] | None = None, count: int = 30
) -> float:
    """The longest time of some work, done again and again: `count` times, and in any case until a task has ended."""
    times: list[float] = []
    while len(times) < count or (during is not None and not during.done()):
        start = time.perf_counter()
        await work()
        times.append(time.perf_counter() - start)
    return max(times)
