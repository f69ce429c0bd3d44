"""What comes with a trainer's steps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hermes_envs.serving.data_order import DataOrder, Ticket, checkpoint_path
from hermes_envs.serving.rollout_api import EnvironmentStatus

if TYPE_CHECKING:
    from hermes_envs.env import AgentEnv

logger = logging.getLogger(__name__)


class Schedule:
    """Evaluates every `steps_per_eval` steps, saves the order of the items as often as the trainer saves, and logs metrics."""

    def __init__(self, env: AgentEnv, order: DataOrder) -> None:
        self._env = env
        self._order = order
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
        for step in _multiples(before, env.curr_step, env.checkpoint_interval):
            await self.save(step, unfinished(step))
        if env.curr_step != before and env.items_sent_this_step >= config.min_items_sent_before_logging:
            env.items_sent_this_step = 0
            await env.wandb_log(metrics)

    async def restore(self, step: int) -> Path | None:
        """Go on with the items from where the order was saved at a step or before it; in which file, if there is one.

        Raises:
            ConfigError: the file cannot be read.
        """
        if not self._env.checkpoint_dir or step <= 0:
            return None
        return await self._order.restore(self._folder, self._env.wandb_prepend, step)

    async def save(self, step: int, unfinished: Iterable[Ticket]) -> None:
        """Save the order of the items."""
        if not self._env.checkpoint_dir:
            return
        path = checkpoint_path(self._folder, self._env.wandb_prepend, step)
        try:
            await self._order.save(path, unfinished)
        except OSError as reason:
            logger.warning("checkpoint_dir: the order of the items cannot be saved: %s", reason)

    @property
    def _folder(self) -> Path:
        return Path(self._env.checkpoint_dir) / "env_checkpoints"

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
