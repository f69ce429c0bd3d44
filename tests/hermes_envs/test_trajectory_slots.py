from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from backends import AcquireTimeoutError, LocalBackend, LocalOptions, SandboxError, SlotLostError
from hermes_envs.services.trajectory_slots import TrajectorySlots, UnknownTrajectoryError
from tests.support.processes import below
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture
async def backend() -> AsyncIterator[LocalBackend]:
    async with LocalBackend(LocalOptions(local_slots=2, acquire_timeout_s=2.0)) as backend:
        yield backend


async def run(slots: TrajectorySlots, backend: LocalBackend, trajectory_id: str, command: str) -> str:
    async with slots.use(trajectory_id) as slot:
        return (await backend.execute(slot, "bash", {"command": command})).output


async def test_a_trajectory_keeps_its_slot_and_sees_no_other(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    await run(slots, backend, "one", "echo mine > file")
    assert await run(slots, backend, "two", "ls") == ""
    assert await run(slots, backend, "one", "cat file") == "mine\n"
    assert (len(slots), backend.get_stats().slots_in_use) == (2, 2)
    assert await slots.release("one")
    assert not await slots.release("one")
    assert await run(slots, backend, "one", "ls") == ""
    await slots.close()
    assert (len(slots), backend.get_stats().slots_in_use) == (0, 0)


async def test_first_calls_that_come_together_share_a_slot(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(run(slots, backend, "one", f"echo {number} >> file"))
    assert backend.get_stats().slots_in_use == 1
    assert sorted(map(int, (await run(slots, backend, "one", "cat file")).split())) == list(range(20))
    await slots.close()


async def test_an_idle_slot_is_given_back_and_a_busy_one_is_not(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend, idle_timeout_s=1.5)
    assert await run(slots, backend, "busy", "touch file; sleep 2; ls") == "file\n"
    await run(slots, backend, "idle", "touch file")
    async with asyncio.timeout(PATIENCE_S):
        while len(slots) == 2:
            await asyncio.sleep(0.25)
            assert await run(slots, backend, "busy", "ls") == "file\n"
    assert (len(slots), backend.get_stats().slots_in_use) == (1, 1)
    assert await run(slots, backend, "idle", "ls") == ""
    await until(lambda: (len(slots), backend.get_stats().slots_in_use) == (0, 0))


async def test_without_a_slot_to_be_had_all_who_wait_are_told_and_the_next_try_is_anew(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    await run(slots, backend, "one", "true")
    await run(slots, backend, "two", "true")
    outcomes = await asyncio.gather(*(run(slots, backend, "three", "true") for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [AcquireTimeoutError] * 3
    await slots.release("one")
    assert await run(slots, backend, "three", "echo here") == "here\n"
    await slots.close()


async def test_who_waits_for_a_released_trajectory_is_told(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    await run(slots, backend, "one", "true")
    await run(slots, backend, "two", "true")
    waiting = asyncio.create_task(run(slots, backend, "three", "true"))
    await asyncio.sleep(0.1)
    assert await slots.release("three")
    with pytest.raises(SlotLostError, match="'three' was released"):
        await waiting
    assert backend.get_stats().waiting == 0
    await slots.close()


async def test_whoever_gives_up_waiting_takes_the_slot_from_nobody(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    await run(slots, backend, "one", "true")
    await run(slots, backend, "two", "true")
    first, second = (asyncio.create_task(run(slots, backend, "three", "echo here")) for _ in range(2))
    await asyncio.sleep(0.1)
    first.cancel()
    await slots.release("one")
    assert await second == "here\n"
    assert first.cancelled()
    await slots.close()


async def test_a_release_ends_what_runs(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    running = asyncio.create_task(run(slots, backend, "one", "sleep 100"))
    await asyncio.sleep(0.3)
    await slots.release("one")
    with pytest.raises(SlotLostError):
        await running
    assert (len(slots), backend.get_stats().slots_in_use) == (0, 0)


async def test_after_a_loss_the_next_call_has_a_fresh_slot(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    await run(slots, backend, "one", "touch file")
    for process in below(os.getpid()):
        if "sandbox_image.server" in process.command:
            os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(SandboxError):
        await run(slots, backend, "one", "ls")
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await run(slots, backend, "one", "ls") == ""
            except SandboxError:
                continue
            break
    await slots.close()


async def test_without_acquiring_an_unknown_trajectory_is_an_error(backend: LocalBackend) -> None:
    slots = TrajectorySlots(backend)
    with pytest.raises(UnknownTrajectoryError, match="'one' has no slot"):
        async with slots.use("one", acquire=False):
            raise AssertionError
    assert backend.get_stats().slots_in_use == 0
