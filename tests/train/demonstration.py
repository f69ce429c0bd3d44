"""Trains the walker: the one command and a Tinker-compatible service, each a process of its own, nothing faked."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from hermes_envs.train.metrics import FILE, read_metrics
from tests.support.rollout_api import free_port
from tests.train.walker import TOOLSET, make_walker

ROOT = Path(__file__).parent.parent.parent
STEPS, LEARNING_RATE = 60, 0.001
COMPARED = 3
"""The rise is that of the mean reward of the last steps over that of the first: so many of each."""


async def learn(folder: Path, seed: int, steps: int = STEPS, learning_rate: float = LEARNING_RATE) -> list[float]:
    """Train a fresh walker; the mean reward of each step. `folder` is new, or empty."""
    model = folder / "model"
    model.mkdir(parents=True)
    make_walker(model)
    async with tinker_service(model, seed) as base_url:
        config = write_config(folder, model, {"total_steps": steps}, {"learning_rate": learning_rate})
        async with trainer("--config", str(config), "--environment", "tests.train.walk", base_url=base_url) as process:
            _, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    return [row["reward"] for row in read_metrics(folder / "run" / FILE)]


def rise(rewards: list[float]) -> float:
    """How much better the last steps were than the first."""
    return (sum(rewards[-COMPARED:]) - sum(rewards[:COMPARED])) / COMPARED


def write_config(
    folder: Path, model: Path, env: Mapping[str, Any] | None = None, tinker: Mapping[str, Any] | None = None
) -> Path:
    """Write a file for trainer and environment, with ports that are free now; the run's folder is `folder / "run"`."""
    inference_port = free_port()
    sections = {
        "env": {
            "policy": "tokens",
            "tokenizer_name": str(model),
            "renderer": "llama-3",
            "rollout_server_url": f"http://127.0.0.1:{free_port()}",
            "group_size": 16,
            "batch_size": 16,
            "total_steps": STEPS,
            "max_batches_offpolicy": 1,
            "max_num_workers": 1,
            "ensure_scores_are_not_same": False,
            "enabled_toolsets": TOOLSET,
            "agent_max_steps": 5,
            "agent_max_tokens": 3,
            "agent_temperature": 1.0,
            "local_slots": 16,
            "use_wandb": False,
            **(env or {}),
        },
        "openai": [
            {
                "base_url": f"http://127.0.0.1:{inference_port}/v1",
                "model_name": str(model),
                "server_type": "sglang",
                "health_check": False,
            }
        ],
        "tinker": {
            "learning_rate": LEARNING_RATE,
            "checkpoint_dir": str(folder),
            "wandb_run_name": "run",
            "inference_port": inference_port,
            **(tinker or {}),
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@asynccontextmanager
async def tinker_service(model: Path, seed: int = 0) -> AsyncIterator[str]:
    """A service for the model in a folder; the block gets its address."""
    arguments = ("tests.tinker_service", "--model-folder", str(model), "--seed", str(seed))
    async with _process(*arguments, stdout=PIPE) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{json.loads(await process.stdout.readline())['port']}"


@asynccontextmanager
async def trainer(*arguments: str, base_url: str) -> AsyncIterator[Process]:
    """The trainer's command; the end of the block ends it."""
    variables = {"TINKER_BASE_URL": base_url, "TINKER_API_KEY": "tml-none", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    async with _process("hermes_envs.train", *arguments, stderr=PIPE, variables=variables) as process:
        yield process


@asynccontextmanager
async def _process(
    module: str, *arguments: str, variables: Mapping[str, str] | None = None, **pipes: int
) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments), cwd=ROOT, env={**os.environ, **(variables or {})}, stdin=DEVNULL, **pipes
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
