"""What every backend promises about its own life: waiting, dying sandboxes, stopping. Each case has a backend of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from backends import AcquireTimeoutError, Layer, SandboxError, SandboxUnavailableError, Slot, SlotLostError
from tests.support.waiting import until


async def bash(backend: Any, slot: Slot, command: str) -> str:
    result = await backend.execute(slot, "bash", {"command": command}, timeout_s=2000)
    return str(result.output)


async def kill_and_await_restart(provider: Any, backend: Any) -> None:
    restarts = backend.get_stats().sandbox_restarts
    provider.kill()
    await until(lambda: backend.get_stats().sandbox_restarts > restarts)


@pytest.mark.any_user
async def test_many_calls_at_once(provider: Any) -> None:
    async with provider.make(slots=8) as backend:
        slots = await asyncio.gather(*(backend.acquire(f"trajectory-{number}") for number in range(8)))
        calls = [bash(backend, slots[number % 8], f"echo {number}") for number in range(200)]
        assert await asyncio.gather(*calls) == [f"{number}\n" for number in range(200)]


@pytest.mark.any_user
@pytest.mark.parametrize("options", [{"tool_max_batch_size": 1}, {"tool_max_batch_size": 3}, {"tool_batch_window_ms": 20}])
async def test_calls_of_any_batching_are_all_answered(provider: Any, options: dict[str, Any]) -> None:
    async with provider.make(slots=2, **options) as backend, backend.slot("one") as one, backend.slot("two") as two:
        calls = [bash(backend, (one, two)[number % 2], f"echo {number} >> log; echo {number}") for number in range(30)]
        assert await asyncio.gather(*calls) == [f"{number}\n" for number in range(30)]
        # Calls of one slot run in the order in which they were made.
        assert (await bash(backend, one, "cat log")).split() == [str(number) for number in range(0, 30, 2)]


@pytest.mark.any_user
async def test_nobody_waits_longer_than_acquire_timeout_s(provider: Any) -> None:
    async with provider.make(slots=1, acquire_timeout_s=0.3) as backend:
        slot = await backend.acquire("holder")
        with pytest.raises(AcquireTimeoutError, match=r"none of 1 slots became free within acquire_timeout_s=0\.3"):
            await backend.acquire("waiter")
        assert backend.get_stats().waiting == 0
        await backend.release(slot)
        async with backend.slot("next"):
            pass


async def test_a_killed_sandbox_ends_its_calls_and_comes_back(provider: Any) -> None:
    async with provider.make(slots=3) as backend:
        slots = [await backend.acquire(f"trajectory-{number}") for number in range(3)]
        calls = [asyncio.create_task(bash(backend, slot, "sleep 1000")) for slot in slots[:2]]
        waiting = asyncio.create_task(backend.acquire("waiter"))
        await asyncio.sleep(0.5)
        provider.kill()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, SlotLostError | SandboxUnavailableError)
        with pytest.raises((SlotLostError, SandboxUnavailableError)):
            await bash(backend, slots[2], "true")
        survivor = await waiting
        assert await bash(backend, survivor, "echo alive; ls -A") == "alive\n"
        assert backend.get_stats().sandbox_restarts == 1
        # Slots of the dead sandbox come to nothing.
        for slot in slots:
            await backend.release(slot)
        await backend.release(survivor)
        again = await asyncio.gather(*(backend.acquire("again") for _ in range(3)))
        assert len({slot.slot_id for slot in again}) == 3


@pytest.mark.any_user
async def test_a_layer_is_built_again_after_its_sandbox_died(provider: Any) -> None:
    builds = 0

    async def build(slot: Slot) -> None:
        nonlocal builds
        builds += 1
        await bash(backend, slot, "echo built > file")

    layer = Layer("layer", build)
    async with provider.make(slots=2) as backend:
        for expected in (1, 2):
            async with backend.slot("trajectory", layer=layer) as slot:
                assert await bash(backend, slot, "cat file") == "built\n"
            assert builds == expected
            if expected == 1:
                await kill_and_await_restart(provider, backend)


@pytest.mark.any_user
async def test_a_sandbox_killed_during_a_build_fails_the_build_only(provider: Any) -> None:
    async def build(slot: Slot) -> None:
        await bash(backend, slot, "sleep 1000")

    async with provider.make(slots=2) as backend:
        acquiring = [asyncio.create_task(backend.acquire("trajectory", layer=Layer("layer", build))) for _ in range(2)]
        await asyncio.sleep(0.5)
        provider.kill()
        for outcome in await asyncio.gather(*acquiring, return_exceptions=True):
            assert isinstance(outcome, SandboxError)
        slots = await asyncio.gather(*(backend.acquire("again") for _ in range(2)))
        assert await bash(backend, slots[0], "echo alive") == "alive\n"


@pytest.mark.any_user
async def test_killing_again_and_again_loses_no_trajectory(provider: Any) -> None:
    """Every trajectory ends with its result or with a typed error, and the pool is whole at the end."""

    async def run(number: int) -> str:
        async with backend.slot(f"trajectory-{number}") as slot:
            return await bash(backend, slot, f"sleep 0.0{number % 10}; echo {number}")

    async with provider.make(slots=4) as backend:
        running = [asyncio.create_task(run(number)) for number in range(60)]
        for _ in range(3):
            await asyncio.sleep(0.4)
            await kill_and_await_restart(provider, backend)
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            assert outcome == f"{number}\n" or isinstance(outcome, SandboxError)
        assert sum(isinstance(outcome, str) for outcome in outcomes) > 20
        assert backend.get_stats().slots_in_use == 0
        await asyncio.gather(*(backend.acquire("again") for _ in range(4)))


async def test_stopping_ends_calls_and_waiting(provider: Any) -> None:
    backend = provider.make(slots=1)
    await backend.start()
    slot = await backend.acquire("holder")
    call = asyncio.create_task(bash(backend, slot, "sleep 1000"))
    waiter = asyncio.create_task(backend.acquire("waiter"))
    await asyncio.sleep(0.2)
    await asyncio.gather(backend.stop(), backend.stop(purge=True))
    await backend.stop()
    with pytest.raises(SlotLostError):
        await call
    with pytest.raises(SandboxUnavailableError):
        await waiter
    with pytest.raises(SandboxUnavailableError):
        await backend.acquire("late")
    with pytest.raises((SlotLostError, SandboxUnavailableError)):
        await bash(backend, slot, "true")
    await backend.release(slot)
    assert backend.get_stats().sandboxes == 0


async def test_stopping_goes_on_when_it_is_cancelled(provider: Any) -> None:
    async def hold() -> None:
        async with provider.make(slots=1) as backend, backend.slot("trajectory") as slot:
            await bash(backend, slot, "sleep 1000")

    task = asyncio.create_task(hold())
    await asyncio.sleep(1.5)
    for _ in range(20):
        task.cancel()
        await asyncio.sleep(0.001)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert provider.remains() == []


@pytest.mark.any_user
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.01, 0.1, 0.3])
async def test_a_cancelled_start_leaves_nothing(provider: Any, after_s: float) -> None:
    async def enter() -> None:
        async with provider.make(slots=2):
            await asyncio.sleep(50)

    task = asyncio.create_task(enter())
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert provider.remains() == []


@pytest.mark.any_user
async def test_a_backend_can_start_again(provider: Any) -> None:
    backend = provider.make(slots=1)
    for _ in range(2):
        async with backend, backend.slot("trajectory") as slot:
            assert await bash(backend, slot, "ls -A") == ""
