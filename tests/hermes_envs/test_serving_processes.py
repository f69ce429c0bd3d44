"""`serve` as a process of its own: how it ends, and how it goes on after it was killed."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.engine.engine import Engine
from tests.support.processes import below, processes
from tests.support.rollout_api import RolloutApi, ScriptedTrainer, free_port
from tests.support.waiting import PATIENCE_S, until


@asynccontextmanager
async def serve(
    folder: Path, api: str, engine: Engine, tokenizer: PreTrainedTokenizerFast, **options: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command line, with its output in `serve.log`; killed at the end if it is still there."""
    defaults = {
        "rollout_server_url": api,
        "tokenizer_name": tokenizer.name_or_path,
        "use_wandb": "false",
        "local_slots": 4,
        "max_num_workers": 2,
        "group_size": 2,
        "agent_max_tokens": 4,
        "ensure_scores_are_not_same": "false",
        "steps_per_eval": 0,
        "worker_timeout": -1,
        "cache_directory": folder / "cache",
    }
    flags = [f"--env.{name}={value}" for name, value in (defaults | options).items()]
    flags += [f"--openai.base_url={engine.base_url}", "--openai.server_type=sglang", "--openai.health_check=false"]
    command = [sys.executable, "-m", "tests.support.counting_env", "serve", *flags]
    command.append(f"--openai.tokenizer_name={tokenizer.name_or_path}")
    with (folder / "serve.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def said(folder: Path, text: str) -> None:
    """Wait until the process has said something."""
    await until(lambda: text in (folder / "serve.log").read_text())


async def test_sigterm_ends_it_in_order_with_all_finished_groups_sent(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
        serve(tmp_path, api.address, engine, tokenizer, max_batches_offpolicy=9, grading_seconds=0.2) as process,
    ):
        await trainer.register(batch_size=4, checkpoint_dir=str(tmp_path / "trainer"))
        await trainer.queue_of(3)
        helpers = {helper.pid for helper in below(process.pid)}
        assert helpers
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
        await until(lambda: not helpers & {process.pid for process in processes()})
        output = (tmp_path / "serve.log").read_text()
        [served] = re.findall(r"groups for the trainer\s*│\s*(\d+)", output)
        assert (await trainer.get("/status"))["queue_size"] == int(served)
    assert "Traceback" not in output
    saved = json.loads((tmp_path / "trainer/env_checkpoints/counting_0/step-0.json").read_text())
    # No batch was made of anything: all is to be done again.
    assert saved["unfinished"] == list(range(saved["position"]))


@pytest.mark.parametrize("missing", ["trainer", "run-api"])
async def test_sigterm_ends_it_while_it_waits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, missing: str) -> None:
    async with RolloutApi(tmp_path / "api.log") as api, Engine(tokenizer, "tinker") as engine:
        address = api.address if missing == "trainer" else f"http://127.0.0.1:{free_port()}"
        async with serve(tmp_path, address, engine, tokenizer) as process:
            await said(tmp_path, "waiting for a trainer" if missing == "trainer" else "run-api does not answer")
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0


async def test_groups_that_cannot_be_sent_any_more_are_kept_in_a_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
        serve(tmp_path, api.address, engine, tokenizer, max_batches_offpolicy=1) as process,
    ):
        await trainer.register(batch_size=4)
        await trainer.queue_of(2)
        await asyncio.sleep(1.0)
        await api.stop()
        await said(tmp_path, "run-api does not answer")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    [kept] = (tmp_path / "cache/unsent").iterdir()
    groups = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(items_of(groups)) == [0, 1]
    assert "2 finished groups could not be sent" in (tmp_path / "serve.log").read_text()


def items_of(batch: list[dict[str, object]]) -> list[int]:
    """The items that the groups of a batch are from."""
    return [int(group["overrides"][0]["trajectory_id"].split("-")[0]) for group in batch]  # type: ignore[index]


async def test_after_a_kill_it_goes_on_with_what_no_batch_was_made_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trainer, API and environment are killed; the trainer goes on from its checkpoint at step 4, and with it the items."""
    folder = tmp_path / "trainer"
    checkpoint = folder / "env_checkpoints/counting_0/step-4.json"
    registration = {"batch_size": 4, "checkpoint_dir": str(folder), "save_checkpoint_interval": 2}
    before: list[int] = []
    after: list[int] = []
    async with Engine(tokenizer, "tinker") as engine, RolloutApi(tmp_path / "api.log") as api:
        async with (
            serve(tmp_path, api.address, engine, tokenizer, slow_item=1) as process,
            ScriptedTrainer(api.address) as trainer,
        ):
            await trainer.register(**registration)
            for _ in range(4):
                await trainer.queue_of(2)
                before += items_of(await trainer.batch())
            await until(checkpoint.exists)
            # Steps that the trainer has made since its checkpoint are lost with it.
            await trainer.batch()
            process.kill()
            await process.wait()
        await api.stop()
        await api.start()
        async with serve(tmp_path, api.address, engine, tokenizer), ScriptedTrainer(api.address) as trainer:
            await trainer.register(**registration, starting_step=4)
            while not set(range(16)) <= set(before + after):
                after += items_of(await trainer.batch())
    assert 1 not in before
    assert 1 in after
    assert len(set(before + after)) == len(before + after)
    assert f"going on with the items where {checkpoint} says" in (tmp_path / "serve.log").read_text()


async def test_an_environment_that_comes_back_alone_goes_on_where_it_ended(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with (
        Engine(tokenizer, "tinker") as engine,
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
    ):
        await trainer.register(batch_size=4, checkpoint_dir=str(tmp_path / "trainer"))
        items: list[int] = []
        async with serve(tmp_path, api.address, engine, tokenizer) as process:
            items += items_of(await trainer.batch())
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
        left = (await trainer.get("/status"))["queue_size"]
        async with serve(tmp_path, api.address, engine, tokenizer):
            await said(tmp_path, "registered as counting_1")
            # Of the batches that the API makes at once it gives out the last first.
            while not set(range(8)) <= set(items):
                items += items_of(await trainer.batch())
    # What the API still had in its queue came from there, and what had begun was begun again.
    assert len(items) - len(set(items)) <= left
