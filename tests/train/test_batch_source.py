"""The trainer's side of atroposlib's real `run-api`, one that comes and goes among them."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hermes_envs.errors import ConfigError, TrainingError
from hermes_envs.train.batch_source import BatchSource
from hermes_envs.train.options import EnvironmentOptions, TrainerOptions, TrainingConfig
from tests.support.rollout_api import RolloutApi, free_port
from tests.support.waiting import PATIENCE_S
from tests.train.test_batch import item


def config(address: str, batch_size: int = 2, patience_s: float = 30.0) -> TrainingConfig:
    env = EnvironmentOptions(tokenizer_name="t", group_size=2, batch_size=batch_size, total_steps=5, rollout_server_url=address)
    return TrainingConfig(env=env, tinker=TrainerOptions(patience_s=patience_s))


def source(address: str, *, is_dry: bool = False, first_step: int = 0, **options: Any) -> BatchSource:
    return BatchSource(config(address, **options), first_step=first_step, is_dry=lambda: is_dry)


async def post(address: str, group: dict[str, Any]) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{address}/scored_data", json=group) as reply:
        assert reply.status == 200, await reply.text()


async def ask(address: str, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(f"{address}{path}") as reply:
        return await reply.json() if path != "/reset_data" else await reply.text()


async def test_batches_come_whole_after_a_registration(run_api: RolloutApi) -> None:
    async with source(run_api.address, first_step=3) as batches:
        await batches.register()
        await post(run_api.address, item(1.0, 0.0))
        async with asyncio.timeout(PATIENCE_S):
            batch = await batches.next_batch()
    assert [group["scores"] for group in batch] == [[1.0, 0.0]]
    assert (await ask(run_api.address, "/status"))["current_step"] == 4


@pytest.mark.parametrize("how", ["restart", "reset"])
async def test_an_api_that_has_forgotten_the_trainer_gets_it_again(run_api: RolloutApi, how: str) -> None:
    async with source(run_api.address) as batches:
        await batches.register()
        batches.step = 2
        waiting = asyncio.create_task(batches.next_batch())
        await asyncio.sleep(0.1)
        if how == "restart":
            await run_api.stop()
            await asyncio.sleep(0.5)
            await run_api.start()
        else:
            await ask(run_api.address, "/reset_data")
        async with asyncio.timeout(PATIENCE_S):
            while (await ask(run_api.address, "/status"))["current_step"] != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            await post(run_api.address, item(1.0, 0.0))
            assert len(await waiting) == 1


async def test_an_api_with_data_from_before_the_trainer_is_made_to_work(run_api: RolloutApi) -> None:
    """Control: it answers `/register`, and refuses batches all the same."""
    await post(run_api.address, item(1.0, 0.0))
    async with source(run_api.address) as batches:
        await batches._register()
        assert (await ask(run_api.address, "/batch"))["status"] == "error"
        await batches.register()
        await post(run_api.address, item(0.0, 1.0))
        async with asyncio.timeout(PATIENCE_S):
            assert [group["scores"] for group in await batches.next_batch()] == [[0.0, 1.0]]


async def test_an_api_at_another_step_begins_at_this_trainers(run_api: RolloutApi) -> None:
    """It counts on by itself, and an environment ends at the last step of that count."""
    async with source(run_api.address, first_step=4) as before:
        await before.register()
        await ask(run_api.address, "/batch")
    async with source(run_api.address, first_step=2) as batches, asyncio.timeout(PATIENCE_S):
        await batches.register()
        assert (await ask(run_api.address, "/status"))["current_step"] == 2
        assert (await ask(run_api.address, "/batch"))["batch"] is None
        # Batches that are made ahead change nothing: it is this trainer's own count from now on.
        for _ in range(2):
            await post(run_api.address, item(1.0, 0.0))
        assert [len(await batches.next_batch()) for _ in range(2)] == [1, 1]
    assert (await ask(run_api.address, "/status"))["current_step"] == 4


@pytest.mark.parametrize(("delay_s", "patience_s"), [(60.0, 0.5), (1.0, 5.0)])
async def test_a_batch_may_take_as_long_as_the_patience_goes(delay_s: float, patience_s: float) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/batch":
            await asyncio.sleep(delay_s)
        return web.json_response({"batch_size": 2, "max_token_len": 9, "current_step": 0, "batch": [item(1.0, 0.0)]})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port := free_port()).start()
        async with source(f"http://127.0.0.1:{port}", patience_s=patience_s) as batches, asyncio.timeout(PATIENCE_S):
            if delay_s < patience_s:
                assert len(await batches.next_batch()) == 1
            else:
                with pytest.raises(TrainingError, match=r"has not answered for 0.5 s"):
                    await batches.next_batch()
    finally:
        await runner.cleanup()


async def test_another_trainers_batch_size_is_an_error_and_leaves_its_batches_alone(run_api: RolloutApi) -> None:
    async with source(run_api.address) as first, source(run_api.address, batch_size=4) as second:
        await first.register()
        await post(run_api.address, item(1.0, 0.0))
        with pytest.raises(ConfigError, match=r"batches of 2 sequences for another trainer, not of 4"):
            await second.next_batch()
        async with asyncio.timeout(PATIENCE_S):
            assert len(await first.next_batch()) == 1


async def test_an_api_that_is_not_there_is_given_up() -> None:
    async with source(f"http://127.0.0.1:{free_port()}", patience_s=0.5) as batches, asyncio.timeout(PATIENCE_S):
        with pytest.raises(TrainingError, match=r"rollout_server_url: run-api has not answered for 0.5 s"):
            await batches.register()


async def test_an_environment_that_has_ended_leaves_no_trainer_waiting(run_api: RolloutApi) -> None:
    async with source(run_api.address, is_dry=True) as batches, asyncio.timeout(PATIENCE_S):
        await batches.register()
        await post(run_api.address, item(1.0, 0.0))
        assert len(await batches.next_batch()) == 1
        with pytest.raises(TrainingError, match="the environment has ended"):
            await batches.next_batch()
