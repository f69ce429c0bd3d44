"""Allocates the slots of all sandboxes of a backend, which adds sandboxes and removes those that died."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from backends.base import Layer, Slot, Snapshot
from backends.codec import MissingError
from backends.errors import (
    AcquireTimeoutError,
    SandboxError,
    SandboxProtocolError,
    SandboxUnavailableError,
    SlotLostError,
    SnapshotError,
)
from backends.sandbox import Sandbox
from sandbox_image.protocol import FreezeRequest, ResetRequest

RESET_BACKOFF_S = (0.1, 10.0)
"""First and longest pause before a slot that could not be reset is tried again."""

_log = logging.getLogger(__name__)

Start = Layer | Snapshot | None
"""What a workspace starts from; None is nothing."""


@dataclass(frozen=True)
class SlotLimits:
    """Whether a slot reaches the network, and what its memory is lowered to; None is what others say, or as configured."""

    network: bool | None = None
    memory_bytes: int | None = None

    def over(self, others: SlotLimits) -> SlotLimits:
        """These limits, and the others where these are None."""
        return SlotLimits(
            others.network if self.network is None else self.network,
            others.memory_bytes if self.memory_bytes is None else self.memory_bytes,
        )


@dataclass(eq=False)
class _PooledSlot:
    """A slot of a sandbox. `lease` is None if it has not been reset since its last use."""

    sandbox: Sandbox
    slot_id: str
    lease: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.sandbox.sandbox_id, self.slot_id


@dataclass(eq=False)
class _Loan:
    """A slot in use by a trajectory, with the limits that `acquire` was told."""

    slot: Slot
    place: _PooledSlot
    limits: SlotLimits


@dataclass(eq=False)
class _Waiter:
    """A pending `acquire`; with `sandbox_id` only a slot of that sandbox will do."""

    place: asyncio.Future[_PooledSlot]
    sandbox_id: str | None = None

    def takes(self, place: _PooledSlot) -> bool:
        return not self.place.done() and self.sandbox_id in (None, place.sandbox.sandbox_id)


class SlotPool:
    """Hands out slots, first come first served, and takes them back.

    A slot is free, lent to a trajectory, or being reset by a background task. A slot changes from one state to the next without
    an `await` in between, so that a cancellation cannot lose it.
    """

    def __init__(self, *, acquire_timeout_s: float, network: bool, on_demand: Callable[[], None]) -> None:
        """`on_demand` is called whenever an `acquire` has to wait, so that the backend can add a sandbox.

        `network` says whether slots reach the network by default. Layers are always built with it.
        """
        self._acquire_timeout_s = acquire_timeout_s
        self._usual_limits = SlotLimits(network)
        self._has_warned = False
        self._on_demand = on_demand
        self._sandboxes: dict[str, Sandbox] = {}
        self._free: deque[_PooledSlot] = deque()
        self._lent: dict[tuple[str, str], _Loan] = {}
        self._waiters: list[_Waiter] = []
        self._resets: set[asyncio.Task[None]] = set()
        self._last_failure: SandboxError | None = None
        self._closed = False

    @property
    def sandboxes(self) -> int:
        """How many sandboxes there are."""
        return len(self._sandboxes)

    @property
    def slots(self) -> int:
        """The number of slots of all sandboxes, including those that cannot be reset."""
        return sum(len(sandbox.slot_ids) for sandbox in self._sandboxes.values())

    @property
    def in_use(self) -> int:
        """How many slots are lent."""
        return len(self._lent)

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._waiters)

    def add(self, sandbox: Sandbox) -> None:
        """Take in the slots of a sandbox; each is reset before somebody gets it."""
        self._sandboxes[sandbox.sandbox_id] = sandbox
        for slot_id in sandbox.slot_ids:
            self._recycle(_PooledSlot(sandbox, slot_id))

    def remove(self, sandbox: Sandbox, error: SandboxError) -> None:
        """Remove a dead sandbox and its slots; calls in them fail with `error` at once."""
        self._sandboxes.pop(sandbox.sandbox_id, None)
        self._free = deque(place for place in self._free if place.sandbox is not sandbox)
        self._lent = {key: loan for key, loan in self._lent.items() if loan.place.sandbox is not sandbox}
        for waiter in self._waiters:
            if waiter.sandbox_id == sandbox.sandbox_id and not waiter.place.done():
                waiter.place.set_exception(_gone(sandbox.sandbox_id))
        sandbox.dispatcher.fail(error)

    def fail(self, error: SandboxError) -> None:
        """Fail every pending `acquire` with `error`, because no sandbox can be started. Later ones wait again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.place.done():
                waiter.place.set_exception(error)

    async def close(self) -> None:
        """Fail every pending `acquire` and cancel the resets. The backend stops the sandboxes."""
        self._closed = True
        self.fail(SandboxUnavailableError("the backend was stopped"))
        for sandbox in list(self._sandboxes.values()):
            self.remove(sandbox, SlotLostError("the backend was stopped"))
        resets = list(self._resets)
        for task in resets:
            task.cancel()
        await asyncio.gather(*resets, return_exceptions=True)

    async def acquire(self, trajectory_id: str, start: Start, limits: SlotLimits = SlotLimits()) -> Slot:
        """As `ToolBackend.acquire`. Time spent on building a layer does not count as waiting."""
        limits = limits.over(self._usual_limits)
        is_usual = start is None and limits == self._usual_limits
        deadline = asyncio.get_running_loop().time() + self._acquire_timeout_s
        while True:
            place = await self._take(start, deadline)
            slot = Slot(place.sandbox.sandbox_id, place.slot_id, trajectory_id, place.lease or "")
            self._lent[place.key] = _Loan(slot, place, limits)
            try:
                if (is_usual and place.lease is not None) or await self._freshen(place.sandbox, slot, start, limits):
                    return slot
            except BaseException:
                self.release(slot)
                raise
            self.release(slot)
            if asyncio.get_running_loop().time() > deadline:
                raise self._timed_out()

    def release(self, slot: Slot, *, reset_workspace: bool = True) -> None:
        """As `ToolBackend.release`; the reset goes on in the background."""
        loan = self._lent.get((slot.sandbox_id, slot.slot_id))
        if loan is None or loan.slot is not slot:
            return
        place = loan.place
        del self._lent[place.key]
        place.lease = None
        if reset_workspace:
            self._recycle(place)
        else:
            self._offer(place)

    async def reset(self, slot: Slot, start: Start, limits: SlotLimits = SlotLimits()) -> None:
        """As `ToolBackend.reset`."""
        loan = self._loan(slot)
        sandbox = loan.place.sandbox
        if isinstance(start, Snapshot) and start.sandbox_id != sandbox.sandbox_id:
            raise SnapshotError(f"the snapshot is in {start.sandbox_id}, the slot in {sandbox.sandbox_id}")
        failure = await self._reset_to(sandbox, slot, start, limits.over(loan.limits))
        if failure is not None:
            raise failure

    def sandbox(self, sandbox_id: str) -> Sandbox | None:
        """A sandbox, if it is alive."""
        return self._sandboxes.get(sandbox_id)

    def sandbox_of(self, slot: Slot) -> Sandbox:
        """The sandbox of a lent slot.

        Raises:
            SlotLostError: the sandbox died, or the slot was released.
        """
        return self._loan(slot).place.sandbox

    def _loan(self, slot: Slot) -> _Loan:
        loan = self._lent.get((slot.sandbox_id, slot.slot_id))
        if loan is None or loan.slot is not slot:
            raise SlotLostError(f"{slot.slot_id} of {slot.sandbox_id} does not belong to {slot.trajectory_id} any more")
        return loan

    async def _take(self, start: Start, deadline: float) -> _PooledSlot:
        if self._closed:
            raise SandboxUnavailableError("the backend was stopped")
        place = self._pick(start)
        if place is not None:
            return place
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), start.sandbox_id if isinstance(start, Snapshot) else None)
        self._waiters.append(waiter)
        timer = loop.call_at(deadline, self._expire, waiter.place)
        if waiter.sandbox_id is None:
            self._on_demand()
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled() and waiter.place.exception() is None:
                # The slot came in the same moment as the cancellation.
                self._offer(waiter.place.result())
            raise
        finally:
            timer.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _pick(self, start: Start) -> _PooledSlot | None:
        """A free slot of the sandbox that has the snapshot; or any, preferably of a sandbox that has the layer."""
        place = next((place for place in self._free if _has(place.sandbox, start)), None)
        if isinstance(start, Snapshot):
            if start.sandbox_id not in self._sandboxes:
                raise _gone(start.sandbox_id)
        elif place is None and self._free:
            place = self._free[0]
        if place is not None:
            self._free.remove(place)
        return place

    def _expire(self, waiter: asyncio.Future[_PooledSlot]) -> None:
        if not waiter.done():
            waiter.set_exception(self._timed_out())

    def _timed_out(self) -> AcquireTimeoutError:
        reason = "" if self._last_failure is None else f"; the last slot that failed: {self._last_failure}"
        return AcquireTimeoutError(
            f"none of {self.slots} slots became free within acquire_timeout_s={self._acquire_timeout_s:g}{reason}"
        )

    def _offer(self, place: _PooledSlot) -> None:
        """Give a free slot to the waiter that has waited longest."""
        if place.sandbox.sandbox_id not in self._sandboxes:
            return
        waiter = next((waiter for waiter in self._waiters if waiter.takes(place)), None)
        if waiter is not None:
            self._waiters.remove(waiter)
            waiter.place.set_result(place)
            return
        self._free.append(place)

    def _recycle(self, place: _PooledSlot) -> None:
        if place.sandbox.sandbox_id in self._sandboxes:
            task = asyncio.create_task(self._reset_until_free(place))
            self._resets.add(task)
            task.add_done_callback(self._resets.discard)

    async def _reset_until_free(self, place: _PooledSlot) -> None:
        pause, longest = RESET_BACKOFF_S
        while place.sandbox.sandbox_id in self._sandboxes:
            try:
                place.lease = await self._reset(place.sandbox, place.slot_id, self._usual_limits)
            except SandboxError as error:
                self._last_failure = error
                _log.warning("%s of %s cannot be reset: %s", place.slot_id, place.sandbox.sandbox_id, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
            else:
                self._offer(place)
                return

    async def _freshen(self, sandbox: Sandbox, slot: Slot, start: Start, limits: SlotLimits) -> bool:
        """Reset a slot before it is handed out; False if that fails."""
        failure = await self._reset_to(sandbox, slot, start, limits)
        if failure is not None:
            self._last_failure = failure
            _log.warning("%s of %s cannot be reset: %s", slot.slot_id, slot.sandbox_id, failure)
            return False
        # The sandbox may have been removed while the answer was on its way.
        return (slot.sandbox_id, slot.slot_id) in self._lent

    async def _reset_to(
        self, sandbox: Sandbox, slot: Slot, start: Start, limits: SlotLimits, *, for_layer: bool = False
    ) -> SandboxError | None:
        """Reset a slot and return the error if that fails. A layer that the sandbox does not have is built first.

        Raises:
            SnapshotError: there is no such snapshot.
            Exception: whatever a build raised.
        """
        while True:
            build = await self._ensure_layer(sandbox, slot, start) if isinstance(start, Layer) else None
            try:
                name = None if start is None else start.name
                slot.lease = await self._reset(sandbox, slot.slot_id, limits, layer=name, for_layer=for_layer)
            except MissingError as error:
                if not isinstance(start, Layer):
                    raise SnapshotError(f"the snapshot is gone: {error}") from error
                # Deleted to make room for others since it was built.
                sandbox.layers.forget(start.name, build)
            except SandboxError as error:
                return error
            else:
                return None

    async def _ensure_layer(self, sandbox: Sandbox, slot: Slot, layer: Layer) -> object:
        async def build() -> None:
            failure = await self._reset_to(sandbox, slot, layer.base, SlotLimits(network=True), for_layer=True)
            if failure is not None:
                raise failure
            await layer.build(slot)
            await sandbox.client.freeze(FreezeRequest(slot.slot_id, layer.name, lease=slot.lease))

        return await sandbox.layers.ensure(layer.name, build)

    async def _reset(
        self, sandbox: Sandbox, slot_id: str, limits: SlotLimits, *, layer: str | None = None, for_layer: bool = False
    ) -> str:
        """The slot's new lease."""
        network, memory_bytes = bool(limits.network), limits.memory_bytes
        request = ResetRequest(slot_id, layer, network=network, for_layer=for_layer, memory_bytes=memory_bytes)
        state = await sandbox.client.reset(request)
        if state.slot_id != slot_id:
            raise SandboxProtocolError(f"asked to reset {slot_id}, the server reset another slot")
        if memory_bytes is not None and state.memory_bytes is None and not self._has_warned:
            self._has_warned = True
            _log.warning("memory_bytes limits each process and not a slot: %s has no control groups", sandbox.sandbox_id)
        return state.lease


def _has(sandbox: Sandbox, start: Start) -> bool:
    """Whether the sandbox has the snapshot or layer already."""
    if isinstance(start, Snapshot):
        return sandbox.sandbox_id == start.sandbox_id
    return start is None or start.name in sandbox.layers


def _gone(sandbox_id: str) -> SnapshotError:
    return SnapshotError(f"the snapshot was in {sandbox_id}, which is gone")
