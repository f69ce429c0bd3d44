"""What serving asks of an environment."""

from __future__ import annotations

from typing import Any, Protocol

from hermes_envs.rollouts.group import FailedRollout
from hermes_envs.runs.summary import Summary
from hermes_envs.serving.data_order import DataOrder
from hermes_envs.serving.outbox import Item
from hermes_envs.serving.rollout_api import Registration, TrainerInfo


class ServedEnvironment(Protocol):
    """An environment that a trainer gets groups of."""

    name: str | None
    summary: Summary
    curr_step: int
    """The trainer's step: batches that it has been given."""
    max_num_workers: int
    """Groups that are rolled out at once."""

    @property
    def config(self) -> Any:
        """All of its options."""

    def data_order(self) -> DataOrder:
        """The items, from the first."""

    def item_name(self, item: Any) -> str:
        """A short name for logs."""

    def enroll(self, registration: Registration, trainer: TrainerInfo) -> None:
        """Take over what the API said when the environment registered."""

    def limit_requests(self, weight: float) -> None:
        """Ask engines for no more than this share of what they take at once; the rest belongs to other environments."""

    async def start_wandb(self, project: str | None, name: str, group: str | None) -> None:
        """Send metrics to the trainer's project, if that is wanted."""

    async def wandb_log(self, metrics: dict[str, Any]) -> None:
        """Send metrics."""

    async def collect_trajectories(self, item: Any) -> tuple[list[Item] | None, list[FailedRollout]]:
        """Roll a group out: what a trainer gets of it, None if some rollout has no score, and those rollouts."""

    async def record_items(self, items: list[Item], item: Any) -> None:
        """Count what goes to a trainer, and write it down where that is wanted."""

    async def evaluate(self) -> None:
        """Measure the policy on held-out items."""
