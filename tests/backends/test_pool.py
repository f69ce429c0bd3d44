"""The pool with several sandboxes: whose slot is taken, what a bad slot and a dead sandbox lead to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from backends.base import Layer, Slot, Snapshot
from backends.dispatch import Dispatcher
from backends.errors import AcquireTimeoutError, SandboxUnavailableError, SlotLostError, SnapshotError
from backends.pool import SlotLimits, SlotPool
from backends.sandbox import Sandbox

Start = Callable[..., Awaitable[Any]]


class Resets:
    """Answers `/reset` and `/layers` as a server would, with slots that can be told to be broken. It runs no tool."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.seen: list[tuple[str, str | None, bool]] = []
        self.memory: list[int | None] = []

    async def reply(self, visit: Any) -> None:
        slot_id = visit.payload["slot_id"]
        if visit.route == "/reset":
            self.seen.append((slot_id, visit.payload["layer"], visit.payload["network"]))
            self.memory.append(visit.payload["memory_bytes"])
        if slot_id in self.broken:
            await visit.answer({"kind": "slot_failed", "error": "the disk is full"}, status=502)
        else:
            await visit.answer({"slot_id": slot_id, "lease": f"lease-{visit.number}", "state": "ready"})


class House:
    """A pool and the sandboxes in it; counts how often the pool asked for more."""

    def __init__(self, start: Start, *, acquire_timeout_s: float = 5.0, network: bool = False) -> None:
        self._start = start
        self.demand = 0
        self.pool = SlotPool(acquire_timeout_s=acquire_timeout_s, network=network, on_demand=self._on_demand)

    def _on_demand(self) -> None:
        self.demand += 1

    async def add(self, name: str, slots: int) -> tuple[Sandbox, Resets]:
        resets = Resets()
        server = await self._start(resets.reply)
        sandbox = Sandbox(name, server.client, [f"slot_{number}" for number in range(slots)], Dispatcher(server.client))
        self.pool.add(sandbox)
        return sandbox, resets


async def build_nothing(slot: Slot) -> None:
    pass


async def test_slots_of_all_sandboxes_are_handed_out_after_a_reset(lying_server: Start) -> None:
    house = House(lying_server)
    _, first = await house.add("first", 2)
    _, second = await house.add("second", 1)
    slots = [await house.pool.acquire("trajectory", None) for _ in range(3)]
    assert sorted((slot.sandbox_id, slot.slot_id) for slot in slots) == [
        ("first", "slot_0"),
        ("first", "slot_1"),
        ("second", "slot_0"),
    ]
    assert all(slot.lease for slot in slots)
    assert len(first.seen) + len(second.seen) == 3
    await house.pool.close()


async def test_a_layer_draws_its_users_to_its_sandbox(lying_server: Start) -> None:
    house = House(lying_server)
    await house.add("first", 2)
    await house.add("second", 2)
    layer = Layer("layer", build_nothing)
    home = await house.pool.acquire("trajectory", layer)
    again = await house.pool.acquire("trajectory", layer)
    assert again.sandbox_id == home.sandbox_id
    elsewhere = await house.pool.acquire("trajectory", layer)
    assert elsewhere.sandbox_id != home.sandbox_id
    await house.pool.close()


async def test_a_slot_that_starts_from_a_snapshot_is_of_its_sandbox(lying_server: Start) -> None:
    house = House(lying_server)
    await house.add("first", 1)
    second, _ = await house.add("second", 1)
    snapshot = Snapshot("second", "name")
    held = await house.pool.acquire("trajectory", snapshot)
    assert held.sandbox_id == "second"
    waiter = asyncio.create_task(house.pool.acquire("trajectory", snapshot))
    await asyncio.sleep(0.05)
    assert (waiter.done(), house.demand) == (False, 0), "a slot of the first is free, and another sandbox would not help"
    impatient = asyncio.create_task(house.pool.acquire("trajectory", None))
    other = await impatient
    assert other.sandbox_id == "first"
    last = asyncio.create_task(house.pool.acquire("trajectory", None))
    await asyncio.sleep(0.05)
    # Those who wait get what they can use, the first of them first.
    house.pool.release(other)
    assert (await last).sandbox_id == "first"
    house.pool.release(held)
    assert (await waiter).sandbox_id == "second"
    waiter = asyncio.create_task(house.pool.acquire("trajectory", snapshot))
    await asyncio.sleep(0.05)
    house.pool.remove(second, SlotLostError("it died"))
    with pytest.raises(SnapshotError, match="second, which is gone"):
        await waiter
    await house.pool.close()


async def test_a_reset_may_take_the_network_away(lying_server: Start) -> None:
    house = House(lying_server, network=True)
    _, resets = await house.add("only", 1)
    slot = await house.pool.acquire("trajectory", None)
    for network in (None, False, True):
        await house.pool.reset(slot, None, SlotLimits(network))
    assert [seen[2] for seen in resets.seen] == [True, True, False, True]
    await house.pool.close()


async def test_a_slot_has_the_limits_that_were_asked_for_until_it_is_released(
    lying_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(lying_server)
    _, resets = await house.add("only", 1)
    slot = await house.pool.acquire("trajectory", None, SlotLimits(network=True, memory_bytes=1 << 30))
    for limits in (SlotLimits(), SlotLimits(False), SlotLimits(None, 1 << 29), SlotLimits()):
        await house.pool.reset(slot, None, limits)
    house.pool.release(slot)
    slot = await house.pool.acquire("trajectory", None)
    # When it was added; for the first trajectory; its own resets; when it was released.
    assert [seen[2] for seen in resets.seen] == [False, True, True, False, True, True, False]
    assert resets.memory == [None, 1 << 30, 1 << 30, 1 << 30, 1 << 29, 1 << 30, None]
    # This server does not say that it limits the memory of slots.
    assert [record.message for record in caplog.records] == [
        "memory_bytes limits each process and not a slot: only has no control groups"
    ]
    await house.pool.close()


async def test_a_layer_is_built_without_the_limits_of_its_user(lying_server: Start) -> None:
    house = House(lying_server)
    _, resets = await house.add("only", 1)
    await house.pool.acquire("trajectory", Layer("layer", build_nothing), SlotLimits(memory_bytes=1 << 30))
    assert resets.seen[1:] == [("slot_0", None, True), ("slot_0", "layer", False)]
    assert resets.memory[1:] == [None, 1 << 30]
    await house.pool.close()


async def test_a_layer_is_built_with_network_and_upon_its_base(lying_server: Start) -> None:
    house = House(lying_server)
    _, resets = await house.add("only", 1)
    base = Layer("base", build_nothing)
    await house.pool.acquire("trajectory", Layer("layer", build_nothing, base=base))
    # When it was added; for building each; for the trajectory.
    assert resets.seen == [
        ("slot_0", None, False),
        ("slot_0", None, True),
        ("slot_0", "base", True),
        ("slot_0", "layer", False),
    ]
    await house.pool.close()


async def test_a_slot_that_cannot_be_reset_is_set_aside_and_comes_back(lying_server: Start) -> None:
    house = House(lying_server, acquire_timeout_s=0.5)
    _, resets = await house.add("only", 2)
    first = await house.pool.acquire("trajectory", None)
    resets.broken.add(first.slot_id)
    house.pool.release(first)
    others = [await house.pool.acquire("trajectory", None)]
    assert others[0].slot_id != first.slot_id
    with pytest.raises(AcquireTimeoutError, match="the disk is full"):
        await house.pool.acquire("trajectory", None)
    resets.broken.clear()
    assert (await house.pool.acquire("trajectory", None)).slot_id == first.slot_id
    await house.pool.close()


async def test_a_slot_that_fails_while_it_is_handed_out_is_replaced(lying_server: Start) -> None:
    house = House(lying_server)
    _, resets = await house.add("only", 2)
    held = [await house.pool.acquire("trajectory", None) for _ in range(2)]
    for slot in held:
        house.pool.release(slot, reset_workspace=False)
    resets.broken.add(held[0].slot_id)
    assert (await house.pool.acquire("trajectory", None)).slot_id == held[1].slot_id
    await house.pool.close()


async def test_a_dead_sandbox_takes_its_slots_along(lying_server: Start) -> None:
    house = House(lying_server)
    dead, _ = await house.add("dead", 2)
    slot, _ = [await house.pool.acquire("trajectory", None) for _ in range(2)]
    waiter = asyncio.create_task(house.pool.acquire("trajectory", None))
    await asyncio.sleep(0.05)
    house.pool.remove(dead, SlotLostError("it died"))
    with pytest.raises(SlotLostError):
        house.pool.sandbox_of(slot)
    house.pool.release(slot)
    assert (house.pool.slots, house.pool.in_use, house.pool.waiting) == (0, 0, 1)
    await house.add("new", 1)
    assert (await waiter).sandbox_id == "new"
    await house.pool.close()


async def test_when_no_sandbox_can_be_had_all_who_wait_are_told(lying_server: Start) -> None:
    house = House(lying_server)
    waiters = [asyncio.create_task(house.pool.acquire("trajectory", None)) for _ in range(3)]
    await asyncio.sleep(0)
    assert house.demand == 3
    house.pool.fail(SandboxUnavailableError("no machines left"))
    for outcome in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(outcome, SandboxUnavailableError)
    # A later one may be luckier.
    waiter = asyncio.create_task(house.pool.acquire("trajectory", None))
    await house.add("late", 1)
    assert (await waiter).sandbox_id == "late"
    await house.pool.close()
