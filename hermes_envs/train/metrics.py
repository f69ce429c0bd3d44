"""What a run reports of each step: to a file, and to wandb."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from hermes_envs.train.options import TrainingConfig

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Metrics:
    """One JSON object a step, in `metrics.jsonl` of the run's folder; owned by `async with`.

    A run that is resumed at a step loses what was written of later ones, which it does again.
    """

    def __init__(self, config: TrainingConfig, first_step: int) -> None:
        self._config = config
        self._first_step = first_step
        self._file: TextIO
        self._to_wandb = False

    async def __aenter__(self) -> Metrics:
        path = self._config.tinker.run_folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _rows_before(path, self._first_step)
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()
        if self._config.env.use_wandb:
            # Imported when asked for: it takes a second, as does what comes with it.
            from hermes_envs.runs.atropos import start_wandb

            tinker = self._config.tinker
            values = self._config.model_dump(mode="json", include={"env", "tinker"})
            group = tinker.wandb_group or tinker.run_name
            self._to_wandb = await asyncio.to_thread(start_wandb, tinker.wandb_project, tinker.run_name, values, group)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._file.close()
        if self._to_wandb:
            await asyncio.to_thread(_wandb().finish)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Report a step. A value that is not a number is left out."""
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()
        if self._to_wandb:
            _wandb().log({f"train/{name}": value for name, value in known.items()}, step=step)
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in known.items()))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of metrics, in the order of steps. A last line that is not whole is left out: a kill cut it off."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _wandb() -> Any:
    return importlib.import_module("wandb")


def _rows_before(path: Path, first_step: int) -> list[str]:
    if not path.exists():
        return []
    return [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] < first_step]
