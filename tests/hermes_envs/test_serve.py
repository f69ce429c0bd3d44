"""`serve` against atroposlib's real API server: what a trainer gets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from atroposlib.envs.base import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.token_record import UNTRAINED_LOGPROB, UNTRAINED_MASK
from tests.engine.engine import Engine
from tests.hermes_envs.test_swe_smith import environment, repairs
from tests.support.rollout_api import RolloutApi, ScriptedTrainer
from tests.support.small_task import write_task_folder


async def test_a_trainer_gets_exact_groups_of_the_registered_size(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_task_folder(tmp_path / "tasks", rows=2)
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker", script=repairs(tokenizer)) as engine,
    ):
        server = APIServerConfig(
            server_type="sglang", base_url=engine.base_url, tokenizer_name=tokenizer.name_or_path, health_check=False
        )
        env = environment(
            tmp_path,
            server,
            policy="tokens",
            tokenizer_name=tokenizer.name_or_path,
            group_size=2,
            agent_max_tokens=300,
            rollout_server_url=api.address,
            max_num_workers=2,
        )
        await trainer.register()
        serving = asyncio.create_task(env.env_manager())
        try:
            batch = await trainer.batch()
        finally:
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
            env.jsonl_writer.close()
    assert sum(len(item["tokens"]) for item in batch) == 4
    known = {exchange.prompt_ids + exchange.output_ids for exchange in engine.exchanges}
    for item in batch:
        assert item["scores"] == [1.0, 1.0]
        for tokens, masks, logprobs in zip(item["tokens"], item["masks"], item["inference_logprobs"], strict=True):
            assert tuple(tokens) in known
            assert len(tokens) == len(masks) == len(logprobs)
            assert all(
                (mask == UNTRAINED_MASK) == (logprob == UNTRAINED_LOGPROB)
                for mask, logprob in zip(masks, logprobs, strict=True)
            )
    assert env.backend.get_stats().slots_in_use == 0
