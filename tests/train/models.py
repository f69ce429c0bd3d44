"""Models for tests, behind a service in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from transformers import PreTrainedTokenizerFast

from hermes_envs.train.options import EnvironmentOptions, TinkerService, TrainerOptions, TrainingConfig
from hermes_envs.train.tinker_model import TinkerModel, tinker_model
from tests.tinker_service.model import TinyModelOptions
from tests.tinker_service.service import TinkerService as TestedService


def new_service(folder: Path, **options: Any) -> TestedService:
    """A service for the model in a folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = TinyModelOptions.model_validate(json.loads((folder / "model.json").read_text()))
    return TestedService(model, tokenizer, model_name=str(folder), **options)


def config_for(folder: Path, address: str = "http://127.0.0.1:1", **tinker: Any) -> TrainingConfig:
    """A configuration of a run of three steps of one group of two."""
    env = EnvironmentOptions(
        tokenizer_name=str(folder), group_size=2, batch_size=2, total_steps=3, rollout_server_url=address, use_wandb=False
    )
    return TrainingConfig(env=env, tinker=TrainerOptions(**{"lora_rank": 8, "patience_s": 5.0, **tinker}))


def address_of(service: TestedService) -> TinkerService:
    """How the trainer is told of it."""
    return TinkerService(base_url=service.base_url, api_key=SecretStr("tml-none"))


@asynccontextmanager
async def model_of_a_service(folder: Path) -> AsyncIterator[tuple[TinkerModel, TestedService]]:
    """A model, and the service that it is from."""
    async with (
        new_service(folder) as service,
        tinker_model(config_for(folder), address_of(service), None) as model,
    ):
        yield model, service
