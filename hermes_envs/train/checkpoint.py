"""Where a run can go on from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from hermes_envs.errors import ConfigError


@dataclass(frozen=True)
class Checkpoint:
    """What is written beside the run: `state_path` has weights and optimiser, `sampler_path` what can be sampled from.

    `step` counts the batches that were trained on. The order of the environment's data has the same number in its own
    checkpoint, which it keeps below `env_checkpoints` in the run's folder.
    """

    step: int
    state_path: str
    sampler_path: str
    base_model: str
    lora_rank: int

    @property
    def name(self) -> str:
        """The name of a checkpoint at the service and of its file."""
        return checkpoint_name(self.step)

    def write(self, folder: Path) -> None:
        """Write it into a folder, all of it or nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def newest(cls, folder: Path) -> Checkpoint | None:
        """The last one that was written into a folder; None if there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        paths = sorted(folder.glob(f"{_PREFIX}*.json"))
        if not paths:
            return None
        try:
            return cls(**json.loads(paths[-1].read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as reason:
            raise ConfigError(f"tinker.checkpoint_dir: {paths[-1]} is no checkpoint of this trainer: {reason}") from reason


_PREFIX = "step-"


def checkpoint_name(step: int) -> str:
    """Names that sort by step."""
    return f"{_PREFIX}{step:08d}"
