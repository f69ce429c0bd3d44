"""The trainer's side of a Tinker-compatible service that runs elsewhere, SkyRL's among them.

HERMES_ENVS_TINKER_URL=http://127.0.0.1:8123 HERMES_ENVS_TINKER_MODEL=PATH pytest -m engine tests/train/test_other_services.py
"""

from __future__ import annotations

import os

import pytest
from pydantic import SecretStr

from hermes_envs.train.batch import make_batch
from hermes_envs.train.options import EnvironmentOptions, TinkerService, TrainerOptions, TrainingConfig
from hermes_envs.train.tinker_model import SamplingRequest, tinker_model

URL, MODEL = os.environ.get("HERMES_ENVS_TINKER_URL"), os.environ.get("HERMES_ENVS_TINKER_MODEL")
PROMPT = [5, 6, 7, 8]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not URL or not MODEL, reason="HERMES_ENVS_TINKER_URL and HERMES_ENVS_TINKER_MODEL name no running service"
    ),
]


async def test_sampled_tokens_can_be_trained_on_saved_and_gone_on_from() -> None:
    assert MODEL is not None
    pytest.importorskip("tinker")
    env = EnvironmentOptions(tokenizer_name=MODEL, group_size=8, batch_size=8, total_steps=1)
    config = TrainingConfig(env=env, tinker=TrainerOptions(lora_rank=8, patience_s=300.0))
    service = TinkerService(base_url=URL, api_key=SecretStr(os.environ.get("TINKER_API_KEY", "tml-none")))
    async with tinker_model(config, service, None) as model:
        completions = await model.sample(SamplingRequest(PROMPT, 8, n=8, stop=[0]))
        group = {
            "tokens": [PROMPT + one.token_ids for one in completions],
            "masks": [[-100] * len(PROMPT) + one.token_ids for one in completions],
            "inference_logprobs": [[1.0] * len(PROMPT) + one.logprobs for one in completions],
            "scores": [float(number % 2) for number in range(len(completions))],
        }
        batch = make_batch([group], 2048, 10**6)
        assert len(batch.sequences) == 8, batch.refused
        outcome = await model.train(batch.sequences, 1e-3)
        # Trained on what was sampled from the very same weights.
        assert outcome.logprob_difference < 1e-2
        await model.publish()
        state_path, _ = await model.save("tested")
    async with tinker_model(config, service, state_path) as model:
        assert len(await model.sample(SamplingRequest(PROMPT, 8))) == 1
