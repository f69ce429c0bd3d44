"""A slot for each trajectory, for callers that know trajectories by name and hold no slots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from backends.base import Slot, ToolBackend
from backends.errors import SlotLostError
from backends.teardown import finish


class UnknownTrajectoryError(Exception):
    """The trajectory has no slot, and the request does not acquire one."""


@dataclass(eq=False)
class _Holding:
    """A trajectory's slot, or its acquisition under way; `uses` counts who uses it or waits for it."""

    acquisition: asyncio.Task[Slot]
    uses: int = 0
    expiry: asyncio.TimerHandle | None = None


class TrajectorySlots:
    """Gets a trajectory its slot when it is first used, and gives the slot back on request or when it was idle for too long."""

    def __init__(self, backend: ToolBackend, idle_timeout_s: float | None = None) -> None:
        """`idle_timeout_s` is how long a slot may be unused before it is released; None: it never is."""
        self._backend = backend
        self._idle_timeout_s = idle_timeout_s
        self._holdings: dict[str, _Holding] = {}
        self._endings: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._holdings)

    @asynccontextmanager
    async def use(self, trajectory_id: str, *, acquire: bool = True) -> AsyncIterator[Slot]:
        """The trajectory's slot, which does not count as idle inside of the block. Uses may overlap.

        Raises:
            UnknownTrajectoryError: it has none, and `acquire` is false.
            SlotLostError: it was released during the wait; or the block raised it, and the next use acquires a new slot.
            SandboxError: as `ToolBackend.acquire`.
        """
        holding = self._holdings.get(trajectory_id)
        if holding is None:
            if not acquire:
                raise UnknownTrajectoryError(f"trajectory {trajectory_id!r} has no slot; its first call gets it one")
            holding = self._acquire(trajectory_id)
        holding.uses += 1
        if holding.expiry is not None:
            holding.expiry.cancel()
        try:
            yield await self._slot(trajectory_id, holding)
        except SlotLostError:
            await self._drop(trajectory_id, holding)
            raise
        finally:
            holding.uses -= 1
            self._expect_idleness(trajectory_id, holding)

    async def release(self, trajectory_id: str, *, reset_workspace: bool = True) -> bool:
        """Give the trajectory's slot back even if it is in use; False if there is none."""
        holding = self._holdings.get(trajectory_id)
        if holding is None:
            return False
        await self._drop(trajectory_id, holding, reset_workspace=reset_workspace)
        return True

    async def close(self) -> None:
        """Give all slots back."""
        for trajectory_id, holding in list(self._holdings.items()):
            await self._drop(trajectory_id, holding)
        while self._endings:
            await asyncio.wait(self._endings)

    def _acquire(self, trajectory_id: str) -> _Holding:
        holding = _Holding(asyncio.create_task(self._backend.acquire(trajectory_id)))
        self._holdings[trajectory_id] = holding

        def forget_failure(acquisition: asyncio.Task[Slot]) -> None:
            if (acquisition.cancelled() or acquisition.exception()) and self._holdings.get(trajectory_id) is holding:
                del self._holdings[trajectory_id]

        holding.acquisition.add_done_callback(forget_failure)
        return holding

    @staticmethod
    async def _slot(trajectory_id: str, holding: _Holding) -> Slot:
        # The acquisition is a task of its own: cancelling one waiter leaves the others waiting.
        await asyncio.wait([holding.acquisition])
        if holding.acquisition.cancelled():
            raise SlotLostError(f"trajectory {trajectory_id!r} was released")
        return holding.acquisition.result()

    def _expect_idleness(self, trajectory_id: str, holding: _Holding) -> None:
        if holding.uses or self._idle_timeout_s is None or self._holdings.get(trajectory_id) is not holding:
            return

        def expire() -> None:
            ending = asyncio.create_task(self._drop(trajectory_id, holding))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

        holding.expiry = asyncio.get_running_loop().call_later(self._idle_timeout_s, expire)

    async def _drop(self, trajectory_id: str, holding: _Holding, *, reset_workspace: bool = True) -> None:
        if self._holdings.get(trajectory_id) is holding:
            del self._holdings[trajectory_id]
        if holding.expiry is not None:
            holding.expiry.cancel()
        await finish(self._give_back(holding, reset_workspace=reset_workspace))

    async def _give_back(self, holding: _Holding, *, reset_workspace: bool) -> None:
        holding.acquisition.cancel()
        await asyncio.wait([holding.acquisition])
        if not holding.acquisition.cancelled() and holding.acquisition.exception() is None:
            await self._backend.release(holding.acquisition.result(), reset_workspace=reset_workspace)
