"""The training loop with a real `run-api` and the real SDK: what it counts, keeps, goes on from and gives up at."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hermes_envs.errors import ConfigError, TrainingError
from hermes_envs.train.batch import make_batch
from hermes_envs.train.batch_source import BatchSource
from hermes_envs.train.checkpoint import Checkpoint
from hermes_envs.train.metrics import FILE, Metrics, read_metrics
from hermes_envs.train.options import TinkerService as TinkerAddress
from hermes_envs.train.options import TrainingConfig
from hermes_envs.train.tinker_model import SamplingRequest, TinkerModel, tinker_model
from hermes_envs.train.trainer import Trainer, resume_from
from tests.support.rollout_api import RolloutApi
from tests.train.test_batch import item
from tests.train.test_batch_source import post

pytest.importorskip("torch")
pytest.importorskip("tinker")

from tests.support.waiting import PATIENCE_S, until
from tests.tinker_service.service import TinkerService
from tests.train.models import ScriptedTraining, address_of, config_for, new_service, service_that_hangs

VOCABULARY = 260


@pytest.fixture
async def service(walker: Path, tmp_path: Path) -> AsyncIterator[TinkerService]:
    async with new_service(walker, checkpoint_folder=tmp_path / "service") as service:
        yield service


def config_of(walker: Path, run_api: RolloutApi, tmp_path: Path, **tinker: object) -> TrainingConfig:
    return config_for(walker, run_api.address, checkpoint_dir=str(tmp_path), wandb_run_name="run", **tinker)


@asynccontextmanager
async def trainer(config: TrainingConfig, service: TinkerService) -> AsyncIterator[tuple[Trainer, TinkerModel, list[int]]]:
    """A trainer that goes on from where its run is, its model, and the steps whose weights it has published."""
    checkpoint = resume_from(config)
    first_step, state_path = (checkpoint.step, checkpoint.state_path) if checkpoint else (0, None)
    published: list[int] = []
    async with (
        BatchSource(config, first_step=first_step, is_dry=lambda: False) as source,
        tinker_model(config, address_of(service), state_path) as model,
        Metrics(config, first_step) as metrics,
    ):
        await source.register()
        yield Trainer(config, source, model, metrics, VOCABULARY, published.append), model, published


async def logprob_of(model: TinkerModel, token: int) -> float:
    """How likely the published weights are to say a token after token 1: by sampling it until it comes."""
    for _ in range(200):
        for completion in await model.sample(SamplingRequest([1, 2], 1, n=64, stop=[])):
            if completion.token_ids == [token]:
                return completion.logprobs[0]
    raise AssertionError(f"token {token} never came")


async def test_a_run_trains_on_what_it_can_and_counts_the_rest(
    walker: Path, run_api: RolloutApi, tmp_path: Path, service: TinkerService
) -> None:
    config = config_of(walker, run_api, tmp_path, learning_rate=0.01)
    async with trainer(config, service) as (run, model, published), asyncio.timeout(PATIENCE_S):
        before = await logprob_of(model, 7)
        running = asyncio.create_task(run.run())
        # Each waits for its turn: batches that are formed together are served newest first.
        broken = item(1.0, 0.0) | {"masks": [[-100, -100, 7, 8, 1]] * 2}
        for step, group in enumerate((item(1.0, 0.0, sampled=[[7], [8]]), item(0.5, 0.5), broken)):
            await post(run_api.address, group)
            await until(lambda step=step: len(published) > step)
        await running
        assert await logprob_of(model, 7) > before
    rows = read_metrics(config.tinker.run_folder / FILE)
    assert published == [1, 2, 3]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["optimizer_steps"] for row in rows] == [1, 0, 0]
    assert [row["sequences_without_advantage"] for row in rows] == [0, 2, 0]
    assert [row["items_refused"] for row in rows] == [0, 0, 1]
    assert (rows[0]["reward"], rows[0]["advantage_abs"], rows[0]["tokens"], rows[0]["sequences"]) == (0.5, 0.5, 2, 2)
    assert rows[0]["logprob_difference"] > 0
    assert "loss" in rows[0]
    assert "loss" not in rows[1]


async def test_a_run_that_is_stopped_goes_on_from_where_it_was(
    walker: Path, run_api: RolloutApi, tmp_path: Path, service: TinkerService
) -> None:
    config = config_of(walker, run_api, tmp_path, learning_rate=0.01)
    async with trainer(config, service) as (run, model, published), asyncio.timeout(PATIENCE_S):
        running = asyncio.create_task(run.run())
        await post(run_api.address, item(1.0, 0.0, sampled=[[7], [8]]))
        await until(lambda: bool(published))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        reached = await logprob_of(model, 7)
    checkpoint = resume_from(config)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.base_model, checkpoint.lora_rank) == (1, str(walker), 8)
    async with trainer(config, service) as (run, model, published), asyncio.timeout(PATIENCE_S):
        assert await logprob_of(model, 7) == pytest.approx(reached, abs=1e-5)
        running = asyncio.create_task(run.run())
        for step in (0, 1):
            await post(run_api.address, item(1.0, 0.0))
            await until(lambda step=step: len(published) > step)
        await running
    assert published == [2, 3]
    assert [row["step"] for row in read_metrics(config.tinker.run_folder / FILE)] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"env.total_steps: the run in .* has done its 3 steps"):
        resume_from(config)


async def test_checkpoints_come_as_often_as_asked_for(
    walker: Path, run_api: RolloutApi, tmp_path: Path, service: TinkerService
) -> None:
    config = config_of(walker, run_api, tmp_path, save_checkpoint_interval=2)
    async with trainer(config, service) as (run, _, published), asyncio.timeout(PATIENCE_S):
        running = asyncio.create_task(run.run())
        for step in range(3):
            await post(run_api.address, item(1.0, 0.0))
            await until(lambda step=step: len(published) > step)
        await running
    names = sorted(path.name for path in config.tinker.run_folder.glob("step-*.json"))
    assert names == ["step-00000002.json", "step-00000003.json"]
    saved = json.loads((config.tinker.run_folder / names[0]).read_text())
    assert saved["state_path"].startswith("tinker://")
    assert saved["sampler_path"].startswith("tinker://")


async def test_a_service_that_fails_ends_the_run_and_not_as_complete(
    walker: Path, run_api: RolloutApi, tmp_path: Path, service: TinkerService
) -> None:
    config = config_of(walker, run_api, tmp_path, patience_s=4.0)
    async with trainer(config, service) as (run, _, published), asyncio.timeout(PATIENCE_S):
        running = asyncio.create_task(run.run())
        await service.__aexit__(None, None, None)
        await post(run_api.address, item(1.0, 0.0))
        with pytest.raises(TrainingError, match="the training step: the Tinker service did not answer in time"):
            await running
    assert published == []
    assert resume_from(config) is None


async def test_a_run_that_gets_no_more_batches_saves_what_it_has(
    walker: Path, run_api: RolloutApi, tmp_path: Path, service: TinkerService
) -> None:
    config = config_of(walker, run_api, tmp_path, patience_s=5.0)
    async with trainer(config, service) as (run, _, published), asyncio.timeout(PATIENCE_S):
        running = asyncio.create_task(run.run())
        await post(run_api.address, item(1.0, 0.0))
        await until(lambda: bool(published))
        await run_api.stop()
        with pytest.raises(TrainingError, match="run-api has not answered for 5 s"):
            await running
    checkpoint = resume_from(config)
    assert checkpoint is not None
    assert checkpoint.step == 1


async def logprobs_of_all() -> list[Any]:
    """What a service answers to a batch of `item(1.0, 0.0)`."""
    return [{"logprobs": SimpleNamespace(tolist=lambda: [-0.5] * 4)}] * 2


@pytest.mark.parametrize("fails", [True, False])
async def test_a_run_that_is_stopped_in_a_step_saves_it_only_if_it_succeeds(
    walker: Path, run_api: RolloutApi, tmp_path: Path, fails: bool
) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def late() -> list[Any]:
        began.set()
        await go_on.wait()
        if fails:
            raise ValueError("the service has forgotten the request")
        return await logprobs_of_all()

    training = ScriptedTraining(logprobs_of_all, late)
    config = config_of(walker, run_api, tmp_path)
    model = TinkerModel(importlib.import_module("tinker"), None, training, 60.0)
    async with (
        BatchSource(config, first_step=0, is_dry=lambda: False) as source,
        Metrics(config, 0) as metrics,
        asyncio.timeout(PATIENCE_S),
    ):
        await source.register()
        running = asyncio.create_task(Trainer(config, source, model, metrics, VOCABULARY, lambda step: None).run())
        await post(run_api.address, item(1.0, 0.0))
        await post(run_api.address, item(1.0, 0.0))
        await began.wait()
        running.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    first, second = ["forward_backward", "optim_step"], ["forward_backward"]
    assert training.requests == first + (second if fails else [*first, "save step-00000002"])


@pytest.mark.parametrize(
    "outputs", [[], [{"logprobs": SimpleNamespace(tolist=lambda: [-0.5] * 4)}], [{"loss": 1}, {"loss": 2}]]
)
async def test_a_service_that_returns_no_logprobs_is_an_error_before_the_step_is_taken(outputs: list[Any]) -> None:
    async def reply() -> list[Any]:
        return outputs

    training = ScriptedTraining(reply)
    model = TinkerModel(importlib.import_module("tinker"), None, training, 5.0)
    with pytest.raises(TrainingError, match=r"the training step: .* did not return a logprob of each token"):
        await model.train(make_batch([item(1.0, 0.0)], 100, 10).sequences, 0.1)
    assert training.requests == ["forward_backward"]


async def test_a_service_that_hangs_is_given_up(walker: Path) -> None:
    """The SDK waits for minutes where it opens its session, in a thread that cannot be ended."""
    async with service_that_hangs() as (address, asked), asyncio.timeout(PATIENCE_S):
        with pytest.raises(
            TrainingError, match=rf"loading {walker} from the service at {address} \(TINKER_BASE_URL\): .* in time"
        ):
            async with tinker_model(
                config_for(walker, patience_s=2.0), TinkerAddress(base_url=address, api_key="tml-none"), None
            ):
                pass
        assert asked.is_set()


async def test_a_service_that_is_not_there_is_said_at_once(walker: Path, tmp_path: Path, service: TinkerService) -> None:
    await service.__aexit__(None, None, None)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(TrainingError, match="TINKER_BASE_URL: no Tinker service answers at http://127"):
            async with tinker_model(config_for(walker, patience_s=2 * PATIENCE_S), address_of(service), None):
                pass


async def test_a_model_that_the_service_does_not_have_is_an_error(walker: Path, service: TinkerService) -> None:
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(TrainingError, match="loading another/model"):
            async with tinker_model(config_for(walker, base_model="another/model"), address_of(service), None):
                pass


def test_a_checkpoint_of_another_model_is_not_gone_on_from(walker: Path, tmp_path: Path) -> None:
    config = config_for(walker, checkpoint_dir=str(tmp_path), wandb_run_name="run")
    Checkpoint(1, "tinker://a", "tinker://b", "another/model", 8).write(config.tinker.run_folder)
    with pytest.raises(ConfigError, match="has checkpoints of another/model"):
        resume_from(config)


def test_a_file_that_is_no_checkpoint_is_named(walker: Path, tmp_path: Path) -> None:
    config = config_for(walker, checkpoint_dir=str(tmp_path), wandb_run_name="run")
    config.tinker.run_folder.mkdir()
    (config.tinker.run_folder / "step-00000001.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"step-00000001.json is no checkpoint"):
        resume_from(config)


async def test_a_row_of_metrics_that_a_kill_cut_off_is_left_out(walker: Path, tmp_path: Path) -> None:
    config = config_for(walker, checkpoint_dir=str(tmp_path), wandb_run_name="run")
    path = config.tinker.run_folder / FILE
    path.parent.mkdir()
    path.write_text('{"step": 0, "reward": 0.5}\n{"step": 1, "rew')
    async with Metrics(config, 1) as metrics:
        metrics.write(1, {"reward": 0.25})
    assert read_metrics(path) == [{"step": 0, "reward": 0.5}, {"step": 1, "reward": 0.25}]
