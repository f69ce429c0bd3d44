"""`serve` against atroposlib's real API server: what a trainer gets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from atroposlib.envs.base import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.rollout import UNTRAINED_LOGPROB, UNTRAINED_MASK
from tests.engine.engine import Engine
from tests.hermes_envs.test_swe_smith import environment, repairs
from tests.support.small_task import write_task_folder

REGISTRATION = {
    "wandb_group": "g",
    "wandb_project": "p",
    "batch_size": 4,
    "max_token_len": 4096,
    "checkpoint_dir": "",
    "save_checkpoint_interval": 0,
    "starting_step": 0,
    "num_steps": 5,
}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[str]:
    """The address of a fresh API server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "atroposlib.api.server:app", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "api.log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            async with aiohttp.ClientSession() as session, asyncio.timeout(60):
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        async with session.get(f"{address}/info"):
                            break
                    await asyncio.sleep(0.2)
            yield address
        finally:
            server.terminate()
            await server.wait()


async def first_batch(session: aiohttp.ClientSession, address: str) -> list[dict[str, Any]]:
    while True:
        async with session.get(f"{address}/batch") as reply:
            batch = (await reply.json())["batch"]
        if batch:
            return list(batch)
        await asyncio.sleep(0.2)


async def test_a_trainer_gets_exact_groups_of_the_registered_size(
    tmp_path: Path, api: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_task_folder(tmp_path / "tasks", rows=2)
    async with Engine(tokenizer, "tinker", script=repairs(tokenizer)) as engine, aiohttp.ClientSession() as session:
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
            rollout_server_url=api,
            max_num_workers=2,
        )
        async with session.post(f"{api}/register", json=REGISTRATION) as reply:
            assert reply.status == 200
        serving = asyncio.create_task(env.env_manager())
        try:
            async with asyncio.timeout(120):
                batch = await first_batch(session, api)
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
