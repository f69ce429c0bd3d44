"""The training loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from backends.teardown import finish
from hermes_envs.errors import ConfigError, HermesEnvsError, TrainingError
from hermes_envs.train.batch import TrainingBatch, make_batch
from hermes_envs.train.batch_source import BatchSource
from hermes_envs.train.checkpoint import Checkpoint, checkpoint_name
from hermes_envs.train.metrics import Metrics
from hermes_envs.train.options import TrainingConfig
from hermes_envs.train.tinker_model import StepOutcome, TinkerModel

LAST_SAVE_S = 60.0
"""How long a run that is stopped may take to save."""

logger = logging.getLogger(__name__)


def resume_from(config: TrainingConfig) -> Checkpoint | None:
    """The checkpoint that a run of this name has reached, if there is one.

    Raises:
        ConfigError: the run was of another model, or is complete.
    """
    folder = config.tinker.run_folder
    checkpoint = Checkpoint.newest(folder)
    if checkpoint is None:
        return None
    if (checkpoint.base_model, checkpoint.lora_rank) != (config.base_model, config.tinker.lora_rank):
        raise ConfigError(
            f"tinker.wandb_run_name: {folder} has checkpoints of {checkpoint.base_model} with lora_rank "
            f"{checkpoint.lora_rank}, not of {config.base_model} with {config.tinker.lora_rank}; choose another name"
        )
    if checkpoint.step >= config.env.total_steps:
        raise ConfigError(
            f"env.total_steps: the run in {folder} has done its {checkpoint.step} steps; raise the number to go on, or choose "
            "another tinker.wandb_run_name to begin anew"
        )
    return checkpoint


class Trainer:
    """Trains a model on the batches of run-api, one optimiser step for each."""

    def __init__(
        self,
        config: TrainingConfig,
        source: BatchSource,
        model: TinkerModel,
        metrics: Metrics,
        vocabulary_size: int,
        published: Callable[[int], None],
    ) -> None:
        """`source.step` says where the run begins; `published` hears of each step whose weights are sampled from."""
        self._config = config
        self._source = source
        self._model = model
        self._metrics = metrics
        self._vocabulary_size = vocabulary_size
        self._published = published
        self._saved_step = source.step
        self._is_mid_step = False
        """Whether the service's model may be in a state that nobody knows."""

    async def run(self) -> None:
        """Train until `total_steps`, then save. A run that ends before saves what it has reached, too, unless a step failed.

        Raises:
            TrainingError: a service failed; the step that was under way is not counted.
            ConfigError: run-api belongs to another trainer.
        """
        try:
            while self._source.step < self._config.env.total_steps:
                await self._step()
        except (asyncio.CancelledError, HermesEnvsError):
            if self._is_mid_step:
                logger.warning("step %d failed half-way; its weights are not saved", self._source.step)
            else:
                await finish(self._save_in_time())
            raise
        await finish(self._save())

    async def _step(self) -> None:
        started = time.monotonic()
        items = await self._source.next_batch()
        received = time.monotonic()
        # A training request that is cut off half-way leaves the service's model in a state that nobody knows.
        await finish(self._train(items, received - started))

    async def _train(self, items: list[dict[str, Any]], waited_s: float) -> None:
        started = time.monotonic()
        batch = make_batch(items, self._config.tinker.max_token_trainer_length, self._vocabulary_size)
        for reason in batch.refused:
            logger.warning("step %d: an item was refused: %s", self._source.step, reason)
        outcome = None
        if batch.sequences:
            self._is_mid_step = True
            outcome = await self._model.train(batch.sequences, self._config.tinker.learning_rate)
            await self._model.publish()
            self._is_mid_step = False
        else:
            logger.warning("step %d: nothing to learn from: no sequence has an advantage", self._source.step)
        self._metrics.write(self._source.step, _values(batch, outcome, waited_s, time.monotonic() - started))
        self._source.step += 1
        self._published(self._source.step)
        interval = self._config.tinker.save_checkpoint_interval
        if interval and self._source.step % interval == 0:
            await self._save()

    async def _save_in_time(self) -> None:
        try:
            async with asyncio.timeout(LAST_SAVE_S):
                await self._save()
        except (TimeoutError, TrainingError) as reason:
            logger.warning("step %d is not saved: %s", self._source.step, str(reason) or "the service did not answer in time")

    async def _save(self) -> None:
        step = self._source.step
        if step == self._saved_step:
            return
        state_path, sampler_path = await self._model.save(checkpoint_name(step))
        checkpoint = Checkpoint(step, state_path, sampler_path, self._config.base_model, self._config.tinker.lora_rank)
        checkpoint.write(self._config.tinker.run_folder)
        self._saved_step = step
        logger.info("step %d: saved %s", step, state_path)


def _values(
    batch: TrainingBatch, outcome: StepOutcome | None, waited_s: float, trained_s: float
) -> dict[str, float | int | None]:
    return {
        "reward": batch.mean_reward,
        "advantage_abs": batch.mean_absolute_advantage,
        "tokens": batch.tokens,
        "sequences": len(batch.sequences),
        "sequences_received": batch.received,
        "sequences_without_advantage": batch.without_advantage,
        "sequences_too_long": batch.too_long,
        "items_refused": len(batch.refused),
        "optimizer_steps": int(outcome is not None),
        "loss": outcome.loss if outcome else None,
        "logprob_difference": outcome.logprob_difference if outcome else None,
        "seconds_waiting": waited_s,
        "seconds_training": trained_s,
    }
