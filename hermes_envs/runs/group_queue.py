"""Runs groups: several at once, each tried a finite number of times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from hermes_envs.errors import NothingCollectedError
from hermes_envs.rollouts.group import Group
from hermes_envs.runs.summary import Reporter, Summary


@dataclass
class GroupQueue:
    """Runs groups concurrently, and again when one ends without a trajectory.

    `next_item` gives None when there is nothing more; `collect` rolls a group out; `lost` accounts for one whose task was
    cancelled from elsewhere; `save` keeps a group that has trajectories.
    """

    next_item: Callable[[], Awaitable[Any]]
    collect: Callable[[Any], Awaitable[Group]]
    lost: Callable[[Any, str], Group]
    save: Callable[[Any, Group], Awaitable[None]]
    reporter: Reporter
    concurrency: int
    attempts: int

    async def run(self, groups: int, summary: Summary) -> None:
        """Collect up to `groups` groups into `summary`. Cancelling it cancels every group and waits for each."""
        running: dict[asyncio.Task[Group], _Attempt] = {}
        started, exhausted = 0, False
        try:
            while True:
                while not exhausted and started < groups and len(running) < self.concurrency:
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
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _start(self, running: dict[asyncio.Task[Group], _Attempt], attempt: _Attempt) -> None:
        running[asyncio.create_task(self._collect(attempt.item), name="group")] = attempt

    async def _collect(self, item: Any) -> Group:
        return await self.collect(item)

    async def _finish(self, task: asyncio.Task[Group], running: dict[asyncio.Task[Group], _Attempt], summary: Summary) -> None:
        attempt = running.pop(task)
        group = self.lost(attempt.item, "its task was cancelled") if task.cancelled() else task.result()
        # A task that was set aside would only be set aside again.
        is_final = bool(group.trajectories) or group.name in summary.set_aside
        if not is_final and attempt.number < self.attempts:
            self._start(running, _Attempt(attempt.item, attempt.number + 1, attempt.started))
            return
        summary.add(group)
        if group.trajectories:
            await self.save(attempt.item, group)
        self.reporter.finished(group, time.perf_counter() - attempt.started)
        self._give_up_if_hopeless(summary)

    def _give_up_if_hopeless(self, summary: Summary) -> None:
        """An engine that is not there fails every group alike: the whole task set would only say it again."""
        failed = summary.failed_groups - len(summary.set_aside)
        if summary.groups == 0 and failed >= max(3, self.concurrency):
            last_reason = next(reversed(summary.failure_reasons.values()))
            raise NothingCollectedError(f"all of the first {failed} groups failed; the last because of {last_reason}")


@dataclass(frozen=True)
class _Attempt:
    item: Any
    number: int = 1
    started: float = field(default_factory=time.perf_counter)
