"""What the tests do through the real SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import tinker
from tinker import types
from transformers import PreTrainedTokenizerFast

from tests.tinker_service.model import TinyModelOptions
from tests.tinker_service.service import TinkerService


@dataclass(frozen=True)
class Client:
    """A session with a service, and the base model that there is."""

    sdk: tinker.ServiceClient
    base_model: str
    base_url: str

    async def new_model(self, rank: int = 8) -> tinker.TrainingClient:
        """Start to train the base model."""
        # The first call of a session blocks until the session is made.
        return await (await asyncio.to_thread(self.sdk.create_lora_training_client, self.base_model, rank=rank, seed=1))

    async def base_sampler(self) -> tinker.SamplingClient:
        """Sample from the base model."""
        return await (await asyncio.to_thread(self.sdk.create_sampling_client, base_model=self.base_model))


@asynccontextmanager
async def connected(base_url: str, base_model: str) -> AsyncIterator[Client]:
    """A session with the service at `base_url`, finished at the end."""
    sdk = tinker.ServiceClient(base_url=base_url, api_key="tml-tests")
    try:
        yield Client(sdk, base_model, base_url)
    finally:
        await sdk.close("success")


@asynccontextmanager
async def client_of_new_service(
    tokenizer: PreTrainedTokenizerFast, *, model: dict[str, Any] | None = None, **service_options: Any
) -> AsyncIterator[Client]:
    """A service in this process, whose model has the options `model`, and a session with it."""
    options = TinyModelOptions.model_validate({"vocabulary_size": len(tokenizer)} | (model or {}))
    service = TinkerService(options, tokenizer, **service_options)
    async with service, connected(service.base_url, service.model_name) as client:
        yield client


async def sampled(
    sampler: tinker.SamplingClient, prompt: Sequence[int], num_samples: int = 1, **params: Any
) -> list[types.SampledSequence]:
    """Completions of a prompt; they end at the limit alone unless `params` say otherwise."""
    params = {"max_tokens": 12, "stop": []} | params
    response = await sampler.sample(types.ModelInput.from_ints(list(prompt)), num_samples, types.SamplingParams(**params))
    return list(response.sequences)


def policy_datum(
    prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float], advantage: float, **more: list[float]
) -> types.Datum:
    """A completion to train on: its tokens have an advantage, the prompt's have none."""
    sequence, untrained = [*prompt, *tokens], [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": sequence[1:],
        "logprobs": untrained + list(logprobs),
        "advantages": untrained + [advantage] * len(tokens),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(sequence[:-1]), loss_fn_inputs=inputs | more)


def text_datum(tokens: Sequence[int]) -> types.Datum:
    """A sequence to imitate."""
    inputs = {"target_tokens": list(tokens[1:]), "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=inputs)


async def imitate(training: tinker.TrainingClient, data: list[types.Datum], **adam: float) -> float:
    """One step on cross entropy; the loss before it."""
    loss = training.forward_backward(data, "cross_entropy")
    step = training.optim_step(types.AdamParams(**{"learning_rate": 0.01} | adam))
    await step
    return (await loss).metrics["loss:sum"]


async def scores(training: tinker.TrainingClient, data: list[types.Datum]) -> list[float]:
    """The logprobs of all target tokens, as the model in training has them now."""
    result = await training.forward(data, "cross_entropy")
    return [logprob for output in result.loss_fn_outputs for logprob in output["logprobs"].tolist()]
