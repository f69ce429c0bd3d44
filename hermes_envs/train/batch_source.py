"""atroposlib's `run-api`, as a trainer sees it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from hermes_envs.errors import ConfigError, TrainingError
from hermes_envs.serving.rollout_api import UNREGISTERED, RolloutApi, RolloutApiAwayError, RolloutApiError
from hermes_envs.train.options import TrainingConfig

POLL_S = 0.25
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 5.0

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


class BatchSource(RolloutApi):
    """Registers the trainer and gets batches, one after another.

    `run-api` keeps everything in memory: one that restarts has forgotten the trainer, which is noticed and made good, and so is
    one that still counts the steps of a trainer from before.
    """

    def __init__(self, config: TrainingConfig, *, first_step: int, is_dry: Callable[[], bool]) -> None:
        """`first_step` is where the run begins; `is_dry` says that no environment will send anything more."""
        super().__init__(config.env.rollout_server_url)
        tinker = config.tinker
        self.step = first_step
        """How many batches were trained on; where a new registration says that it starts."""
        self._is_dry = is_dry
        self._batch_size = config.env.batch_size
        self._patience_s = tinker.patience_s
        self._registered = False
        self._registration = {
            "wandb_group": tinker.wandb_group or tinker.run_name,
            "wandb_project": tinker.wandb_project,
            "batch_size": config.env.batch_size,
            "max_token_len": tinker.max_token_trainer_length,
            "checkpoint_dir": str(tinker.run_folder.absolute()),
            "save_checkpoint_interval": tinker.save_checkpoint_interval,
            "num_steps": config.env.total_steps,
        }

    async def register(self) -> None:
        """See to it that run-api knows this trainer.

        Raises:
            ConfigError: it makes batches of another size, for another trainer.
            TrainingError: it cannot be reached.
            RolloutApiError: it is no run-api.
        """
        batch_size = await self._known_batch_size()
        if batch_size == self._batch_size and not self._registered and (step := await self._known_step()) != self.step:
            # It would go on from there, whatever a new registration says, and environments end at the last step by its count.
            logger.warning("run-api at %s is at step %d, this trainer at %d; resetting it", self.url, step, self.step)
            batch_size = await self._reset()
        if batch_size == UNREGISTERED:
            if self._registered:
                logger.warning(
                    "run-api at %s was restarted or reset and has forgotten this trainer; registering again", self.url
                )
            batch_size = await self._register()
        if batch_size == UNREGISTERED:
            # It ignores whoever registers after data has come, and refuses batches from then on. Environments notice a reset
            # and send again what they have.
            logger.warning("run-api at %s had groups before it had a trainer, which spoils it; resetting it", self.url)
            await self._reset()
            batch_size = await self._register()
        if batch_size != self._batch_size:
            raise ConfigError(
                f"env.batch_size: run-api at {self.url} makes batches of {batch_size} sequences for another trainer, not of "
                f"{self._batch_size}; restart it, or give each trainer its own"
            )
        self._registered = True

    async def next_batch(self) -> list[dict[str, Any]]:
        """Wait for a batch: its items, as environments sent them.

        Raises:
            TrainingError: there will be none; or as `register`.
        """
        while True:
            await self.register()
            is_dry = self._is_dry()
            # It has no longer what it has begun to send: a batch that is given up is lost.
            reply = await self._patiently(lambda: self._ask("GET", "/batch", self._patience_s))
            if reply.get("batch"):
                return list(reply["batch"])
            if is_dry:
                raise TrainingError(
                    f"the environment has ended and there is no batch for step {self.step}: has it no more items?"
                )
            await asyncio.sleep(POLL_S)

    async def _known_batch_size(self) -> int:
        return (await self._patiently(self.trainer_info)).batch_size

    async def _known_step(self) -> int:
        return int((await self._patiently(lambda: self._ask("GET", "/status")))["current_step"])

    async def _reset(self) -> int:
        with suppress(RolloutApiError):  # Its answer is not JSON.
            await self._patiently(lambda: self._ask("GET", "/reset_data"))
        return await self._known_batch_size()

    async def _register(self) -> int:
        await self._patiently(lambda: self._ask("POST", "/register", json=self._registration | {"starting_step": self.step}))
        return await self._known_batch_size()

    async def _patiently(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        started, delay_s = time.monotonic(), _FIRST_RETRY_S
        while True:
            try:
                return await ask()
            except RolloutApiAwayError as reason:
                if time.monotonic() - started > self._patience_s:
                    raise TrainingError(
                        f"rollout_server_url: run-api has not answered for {self._patience_s:g} s: {reason}"
                    ) from reason
                if delay_s > 1:
                    logger.warning("run-api does not answer, trying again: %s", reason)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LAST_RETRY_S)
