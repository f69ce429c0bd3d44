"""Models for tests, behind a service in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch._dynamo  # noqa: F401 - torch's first optimiser imports it, while a client of the service in this process waits.
from aiohttp import web
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
    return TrainingConfig(env=env, tinker=TrainerOptions(**{"lora_rank": 8, "patience_s": 60.0, **tinker}))


def address_of(service: TestedService) -> TinkerService:
    """How the trainer is told of it."""
    return TinkerService(base_url=service.base_url, api_key=SecretStr("tml-none"))


@asynccontextmanager
async def model_of_a_service(folder: Path, **tinker: Any) -> AsyncIterator[tuple[TinkerModel, TestedService]]:
    """A model, and the service that it is from."""
    async with (
        new_service(folder) as service,
        tinker_model(config_for(folder, **tinker), address_of(service), None) as model,
    ):
        yield model, service


class ScriptedTraining:
    """The SDK's client of a service that fails in a way of its own: each training request gets the next of the replies."""

    def __init__(self, *replies: Callable[[], Awaitable[list[Any]]]) -> None:
        self._replies = list(replies)
        self.requests: list[str] = []

    async def forward_backward(self, data: Any, loss: str) -> Any:
        """The loss's outputs, as the script has them."""
        self.requests.append("forward_backward")
        return SimpleNamespace(metrics={}, loss_fn_outputs=await self._replies.pop(0)())

    async def optim_step(self, adam: Any) -> None:
        """Succeed."""
        self.requests.append("optim_step")

    async def save_weights_and_get_sampling_client(self) -> None:
        """Succeed."""

    async def save_state(self, name: str) -> Any:
        """Succeed."""
        self.requests.append(f"save {name}")
        return SimpleNamespace(path="tinker://state")

    async def save_weights_for_sampler(self, name: str) -> Any:
        """Succeed."""
        return SimpleNamespace(path="tinker://sampler")


@asynccontextmanager
async def service_that_hangs() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A service that answers whether it is there and nothing else; its address, and whether it was asked for anything else."""
    asked = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if not request.path.endswith("/healthz"):
            asked.set()
            await asyncio.sleep(3600)
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()
