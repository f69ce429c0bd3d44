"""Collects groups of one environment: what `process` and `evaluate` have in common."""

from __future__ import annotations

from typing import Any, Protocol

from hermes_envs.errors import NothingCollectedError
from hermes_envs.rollouts.group import Group
from hermes_envs.runs.group_queue import GroupQueue, Next, QueueOptions, Save
from hermes_envs.runs.reporter import Reporter
from hermes_envs.runs.summary import Summary


class CollectedEnvironment(Protocol):
    """What collecting asks of an environment."""

    @property
    def config(self) -> QueueOptions:
        """How many groups are rolled out at once."""

    def item_name(self, item: Any) -> str:
        """A short name for logs and records."""

    async def collect_group(self, item: Any, size: int) -> Group:
        """Roll out `size` trajectories of an item."""


async def collect(
    env: CollectedEnvironment,
    next_item: Next,
    *,
    groups: int,
    expected: int,
    size: int,
    summary: Summary,
    title: str,
    save: Save,
) -> None:
    """Collect up to `groups` groups of `size` rollouts, show how far that is of `expected` ones, and end with the account.

    Raises:
        NothingCollectedError: no trajectory was collected.
        EnvironmentDefectError: the environment's code fails on every task.
    """
    reporter = Reporter(title)
    reporter.expect(expected)
    queue = GroupQueue(next_item, env.collect_group, env.item_name, save, reporter, size, env.config)
    try:
        with reporter:
            await queue.run(groups, summary)
    finally:
        reporter.conclude(summary)
    if not summary.trajectories:
        raise NothingCollectedError("no trajectory was collected")
