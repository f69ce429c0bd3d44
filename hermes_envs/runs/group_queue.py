"""Runs groups: several at once, each tried a finite number of times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from backends.teardown import finish
from hermes_envs.rollouts.group import FailedRollout, Group
from hermes_envs.runs.reporter import Reporter
from hermes_envs.runs.summary import Summary

Next = Callable[[], Awaitable[Any]]
"""Gives the next item, None when there are no more."""
Save = Callable[[Any, Group], Awaitable[None]]
"""Keeps what was collected for an item."""


class QueueOptions(BaseModel):
    """How many groups are rolled out at once, and how often one is tried."""

    model_config = ConfigDict(extra="forbid")

    max_concurrent_groups: int = Field(4, ge=1, description="Groups that `process` rolls out at once.")
    group_attempts: int = Field(2, ge=1, description="Times that a group is tried when none of its rollouts completes.")


@dataclass
class GroupQueue:
    """Runs groups of `size` rollouts concurrently, and again when one ends without a trajectory.

    `roll_out` takes an item and a size; `item_name` names the group of an item whose task somebody else cancelled; `save` gets
    each group that has trajectories.
    """

    next_item: Next
    roll_out: Callable[[Any, int], Awaitable[Group]]
    item_name: Callable[[Any], str]
    save: Save
    reporter: Reporter
    size: int
    options: QueueOptions

    async def run(self, groups: int, summary: Summary) -> None:
        """Collect up to `groups` groups into `summary`. Cancelling it cancels every group and waits for each.

        Raises:
            NothingCollectedError: all of the first groups failed.
            EnvironmentDefectError: all of the first groups had rollouts that ended by a defect of the environment's code.
        """
        running: dict[asyncio.Task[Group], _Attempt] = {}
        started, exhausted = 0, False
        try:
            while True:
                while not exhausted and started < groups and len(running) < self.options.max_concurrent_groups:
                    item = await self.next_item()
                    exhausted = item is None
                    if not exhausted:
                        started += 1
                        self._start(running, _Attempt(item))
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await self._finish(task, running, summary)
        finally:
            await finish(self._wind_up(running, summary))

    async def _wind_up(self, running: dict[asyncio.Task[Group], _Attempt], summary: Summary) -> None:
        """Cancel what runs, and keep what has ended: one that ended a run need not cost the groups that ended with it."""
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for task, attempt in running.items():
            if not task.cancelled() and task.exception() is None and task.result().trajectories:
                summary.add(task.result())
                await self.save(attempt.item, task.result())

    def _start(self, running: dict[asyncio.Task[Group], _Attempt], attempt: _Attempt) -> None:
        running[asyncio.create_task(self._roll_out(attempt.item), name="group")] = attempt

    async def _roll_out(self, item: Any) -> Group:
        return await self.roll_out(item, self.size)

    async def _finish(self, task: asyncio.Task[Group], running: dict[asyncio.Task[Group], _Attempt], summary: Summary) -> None:
        attempt = running.pop(task)
        group = self._cancelled_group(attempt.item) if task.cancelled() else task.result()
        if not group.trajectories and group.may_be_tried_again and attempt.number < self.options.group_attempts:
            self._start(running, _Attempt(attempt.item, attempt.number + 1, attempt.started))
            return
        summary.add(group)
        if group.trajectories:
            await self.save(attempt.item, group)
        self.reporter.finished(group, time.perf_counter() - attempt.started)
        first_groups = max(3, self.options.max_concurrent_groups)
        summary.give_up_on_defects(first_groups)
        summary.give_up_if_hopeless(first_groups)

    def _cancelled_group(self, item: Any) -> Group:
        name = self.item_name(item)
        return Group.of(name, [FailedRollout(f"{name}-{index}", "its task was cancelled", 1) for index in range(self.size)])


@dataclass(frozen=True)
class _Attempt:
    item: Any
    number: int = 1
    started: float = field(default_factory=time.perf_counter)
