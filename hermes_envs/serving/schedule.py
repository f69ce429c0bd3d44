"""What comes with a trainer's steps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hermes_envs.serving.data_order import DataOrder, Ticket, checkpoint_path
from hermes_envs.serving.environment import ServedEnvironment
from hermes_envs.serving.rollout_api import EnvironmentStatus, Registration

logger = logging.getLogger(__name__)


class Schedule:
    """Evaluates every `steps_per_eval` steps, saves the order of the items as often as the trainer saves, and logs metrics."""

    def __init__(self, env: ServedEnvironment, order: DataOrder) -> None:
        self._env = env
        self._order = order
        self.registration: Registration | None = None
        self.items_sent = 0
        """Since metrics were last logged."""
        self._evaluation: asyncio.Task[None] | None = None

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation is running."""
        return self._evaluation is not None

    async def note_step(
        self, status: EnvironmentStatus, unfinished: Callable[[int], Iterable[Ticket]], metrics: dict[str, Any]
    ) -> None:
        """Do what is due. `unfinished` gives the items that a trainer has not had which has had so many batches."""
        env, config = self._env, self._env.config
        before, env.curr_step = env.curr_step, status.current_step
        if _multiples(before, env.curr_step, config.steps_per_eval):
            self._evaluate()
        for step in _multiples(before, env.curr_step, self.registration.checkpoint_interval if self.registration else 0):
            await self.save(step, unfinished(step))
        if env.curr_step != before and self.items_sent >= config.min_items_sent_before_logging:
            self.items_sent = 0
            await env.wandb_log(metrics)

    async def restore(self, step: int) -> Path | None:
        """Go on with the items from where the order was saved at a step or before it; in which file, if there is one.

        Raises:
            ConfigError: the file cannot be read.
        """
        if self._place is None or step <= 0:
            return None
        return await self._order.restore(*self._place, step)

    async def save(self, step: int, unfinished: Iterable[Ticket]) -> None:
        """Save the order of the items."""
        if self._place is None:
            return
        path = checkpoint_path(*self._place, step)
        try:
            await self._order.save(path, unfinished)
        except OSError as reason:
            logger.warning("checkpoint_dir: the order of the items cannot be saved: %s", reason)

    @property
    def _place(self) -> tuple[Path, str] | None:
        """The folder that the trainer saves to and the name that the order has there; None where it saves nothing."""
        if self.registration is None or not self.registration.checkpoint_dir:
            return None
        return Path(self.registration.checkpoint_dir) / "env_checkpoints", self.registration.wandb_name

    def _evaluate(self) -> None:
        if self._evaluation is not None:
            logger.warning("no evaluation at step %d: the one before is still running", self._env.curr_step)
            return
        self._evaluation = asyncio.create_task(self._env.evaluate(), name="evaluation")
        self._evaluation.add_done_callback(self._note_evaluation)

    def _note_evaluation(self, evaluation: asyncio.Task[None]) -> None:
        """One that fails costs its figures, not the training."""
        self._evaluation = None
        if not evaluation.cancelled() and (problem := evaluation.exception()) is not None:
            self._env.summary.failed_evaluations += 1
            logger.error("the evaluation failed: %s: %s", type(problem).__name__, problem, exc_info=problem)

    async def finish(self) -> None:
        """Let an evaluation come to its end."""
        if self._evaluation is not None:
            await asyncio.wait([self._evaluation])

    async def stop(self) -> None:
        """Cancel an evaluation and wait for it."""
        if self._evaluation is not None:
            self._evaluation.cancel()
            await self.finish()


def _multiples(before: int, now: int, of: int) -> Sequence[int]:
    """Those that were passed or reached; none of 0 or less."""
    return range(before - before % of + of, now + 1, of) if of > 0 else ()
