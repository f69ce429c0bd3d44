"""Environments whose items are a set of tasks in an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hermes_envs.env import AgentEnv
from hermes_envs.task_order import TaskOrder


class OrderedEnv(AgentEnv):
    """Takes its items from `order`, which `setup_agent_env` makes, and can go on at a place in it."""

    order: TaskOrder[Any]

    async def get_next_item(self) -> Any:
        """The next task; `process` takes each once, a trainer gets them over and over in a new order."""
        return self.order.next(once=self.process_mode)

    def number_of_items(self) -> int:
        """All tasks that are in the order."""
        return len(self.order)

    def data_position(self) -> Sequence[int]:
        """Where it is in its tasks."""
        return self.order.position

    def restore_data_position(self, position: Sequence[int]) -> None:
        """Go on there. Raises: ConfigError: there is no such place."""
        self.order.restore_position(position)
