"""Four times as much takes about four times as long: nothing here grows with the square of its size.

Processor time is compared, that of the slot servers included, so that other work on the machine does not matter.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from backends import LocalBackend, LocalOptions, Slot
from backends.dispatch import Dispatcher
from backends.pool import SlotPool
from backends.sandbox import Sandbox
from sandbox_image.protocol import ExecuteRequest
from tests.support.processes import below

Start = Callable[..., Awaitable[Any]]
ATTEMPTS = 3
MOST = 8
"""Between 4, where time grows in proportion, and 16, where it grows with the square."""


def processor_seconds() -> float:
    """What this process has used, and those that it has started and that run."""
    used = time.process_time()
    for process in below(os.getpid()):
        with suppress(OSError):
            # As clock_getcpuclockid(3) makes it; /proc counts ticks of 10 ms.
            used += time.clock_gettime((~process.pid << 3) | 2)
    return used


async def growth(work: Callable[[int], Awaitable[object]], size: int) -> float:
    """How many times the processor time of `work(size)` is needed for `work(4 * size)`; each is taken from its best attempt."""
    best = {size: float("inf"), 4 * size: float("inf")}
    await work(size)
    for _ in range(ATTEMPTS):
        for each in best:
            # What the collector does depends on what else is in memory.
            gc.collect()
            gc.disable()
            start = processor_seconds()
            await work(each)
            best[each] = min(best[each], processor_seconds() - start)
            gc.enable()
    return best[4 * size] / best[size]


async def test_waiting_for_slots(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        await visit.answer({"slot_id": visit.payload["slot_id"], "lease": f"{visit.number}", "state": "ready"})

    server = await lying_server(reply)
    pool = SlotPool(acquire_timeout_s=600, network=False, on_demand=lambda: None)
    pool.add(Sandbox("only", server.client, [f"slot_{number}" for number in range(8)], Dispatcher(server.client)))

    async def use(number: int) -> None:
        slot = await pool.acquire(f"trajectory-{number}", None)
        await asyncio.sleep(0)
        pool.release(slot)

    async def wait(count: int) -> None:
        await asyncio.gather(*(use(number) for number in range(count)))

    assert await growth(wait, 200) < MOST
    await pool.close()


def call(number: int, slots: int) -> ExecuteRequest:
    return ExecuteRequest(f"slot_{number % slots}", "bash", {"command": "true"}, execution_id=f"{number}", timeout=600.0)


@pytest.mark.parametrize("share_a_slot", [True, False])
async def test_calls_of_one_moment(lying_server: Start, share_a_slot: bool) -> None:
    async def reply(visit: Any) -> None:
        if visit.route == "/execute":
            await visit.answer({"success": True, "output": "", "execution_id": visit.payload["execution_id"]})
            return
        await visit.start_stream()
        for index, item in enumerate(visit.payload):
            result = {"success": True, "output": "x" * 1000, "execution_id": item["execution_id"]}
            await visit.line({"index": index, "result": result})
        await visit.chunk(b"")

    server = await lying_server(reply)
    dispatcher = Dispatcher(server.client)

    async def send(count: int) -> None:
        await asyncio.gather(*(dispatcher.submit(call(number, 1 if share_a_slot else count)) for number in range(count)))

    assert await growth(send, 300 if share_a_slot else 800) < MOST


async def test_callers_who_leave(lying_server: Start) -> None:
    server = await lying_server(lambda visit: visit.answer({}))
    dispatcher = Dispatcher(server.client, window_s=600)

    async def leave(count: int) -> None:
        callers = [asyncio.create_task(dispatcher.submit(call(number, count))) for number in range(count)]
        await asyncio.sleep(0)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)

    assert await growth(leave, 2000) < MOST
    assert server.routes == []


@pytest.fixture
async def backend(short_path: Path) -> AsyncIterator[LocalBackend]:
    async with LocalBackend(LocalOptions(local_slots=1, local_data_dir=str(short_path))) as backend:
        yield backend


async def fill(backend: LocalBackend, slot: Slot, size: int) -> None:
    """Make two directories of files, the second with four times as many."""
    command = f"for n in {size} {4 * size}; do mkdir $n; (cd $n; seq -f file%g $n | xargs -n 1000 touch); done"
    assert (await backend.execute(slot, "bash", {"command": command}, timeout_s=600)).success


async def test_a_listing(backend: LocalBackend) -> None:
    async with backend.slot("trajectory") as slot:
        await fill(backend, slot, 10_000)

        async def listing(count: int) -> None:
            listed = await backend.list_artifacts(slot, str(count), recursive=True, max_entries=100_000)
            assert len(listed.entries) == count

        assert await growth(listing, 10_000) < MOST


async def test_an_archive(backend: LocalBackend) -> None:
    async with backend.slot("trajectory") as slot:
        await fill(backend, slot, 2000)

        async def archive(count: int) -> None:
            archived = await backend.archive_artifacts(slot, str(count), max_entries=100_000)
            assert archived.entries >= count

        assert await growth(archive, 2000) < MOST
