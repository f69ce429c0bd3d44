"""`serve` against atroposlib's real API server and a scripted trainer that checks each batch."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.errors import ConfigError
from hermes_envs.policies.token_record import UNTRAINED_LOGPROB, UNTRAINED_MASK
from hermes_envs.serving.rollout_api import RolloutApiError
from hermes_envs.serving.serving import Serving
from tests.engine.engine import Engine, Exchange
from tests.engine.speech import says
from tests.support.counting_env import CountingConfig, CountingEnv, score_of
from tests.support.rollout_api import RolloutApi, ScriptedTrainer, free_port
from tests.support.waiting import PATIENCE_S, until


def counting(
    folder: Path,
    api: str,
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    kind: type[CountingEnv] = CountingEnv,
    **options: Any,
) -> CountingEnv:
    """The environment, as the command line would make it."""
    defaults = {
        "rollout_server_url": api,
        "policy": "tokens",
        "tokenizer_name": tokenizer.name_or_path,
        "use_wandb": False,
        "local_slots": 8,
        "max_num_workers": 4,
        "group_size": 2,
        "agent_max_tokens": 4,
        "agent_temperature": 1.0,
        "steps_per_eval": 0,
        "worker_timeout": -1.0,
        "cache_directory": str(folder / "cache"),
    }
    server = APIServerConfig(
        server_type="sglang", base_url=engine.base_url, tokenizer_name=tokenizer.name_or_path, health_check=False
    )
    return kind(CountingConfig.model_validate(defaults | options), [server])


@asynccontextmanager
async def serving(env: CountingEnv) -> AsyncIterator[asyncio.Task[None]]:
    """Serve in the background, and end that in order."""
    task = asyncio.create_task(env.env_manager())
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert env.backend.get_stats().slots_in_use == 0


class Examiner:
    """Takes batches and checks everything about them that can be known."""

    def __init__(self, engine: Engine, group_size: int, batch_size: int, *, equal_scores: bool = False) -> None:
        self._engine = engine
        self._told: dict[tuple[int, ...], Exchange] = {}
        self._known = 0
        self._group_size = group_size
        self._batch_size = batch_size
        self._equal_scores = equal_scores
        self.trajectory_ids: set[str] = set()
        self.items: list[int] = []

    def examine(self, batch: list[dict[str, Any]]) -> None:
        """Check a batch."""
        assert sum(len(group["tokens"]) for group in batch) == self._batch_size
        for exchange in self._engine.exchanges[self._known :]:
            self._told[exchange.prompt_ids + exchange.output_ids] = exchange
        self._known = len(self._engine.exchanges)
        for group in batch:
            ids = {override["trajectory_id"] for override in group["overrides"]}
            assert len(group["tokens"]) == len(group["scores"]) == len(ids) == self._group_size
            assert not self.trajectory_ids & ids, "a group came twice"
            self.trajectory_ids |= ids
            [item] = {int(id_.split("-")[0]) for id_ in ids}
            self.items.append(item)
            assert self._equal_scores or len(set(group["scores"])) > 1
            columns = (group[name] for name in ("tokens", "masks", "inference_logprobs", "scores"))
            for tokens, masks, logprobs, score in zip(*columns, strict=True):
                self._examine_sequence(tokens, masks, logprobs)
                assert score == score_of(masks)

    def _examine_sequence(self, tokens: list[int], masks: list[int], logprobs: list[float]) -> None:
        """What is trained is what the engine sampled after exactly the tokens before it."""
        assert len(tokens) == len(masks) == len(logprobs)
        end = 0
        for trained, run in itertools.groupby(masks, key=lambda mask: mask != UNTRAINED_MASK):
            begin, end = end, end + len(list(run))
            if trained:
                exchange = self._told[tuple(tokens[:end])]
                assert len(exchange.prompt_ids) == begin
                assert tuple(masks[begin:end]) == exchange.output_ids
                assert tuple(logprobs[begin:end]) == exchange.logprobs
            else:
                assert set(logprobs[begin:end]) == {UNTRAINED_LOGPROB}
        assert trained, "nothing was sampled at the end"


@pytest.mark.parametrize("batches", [25, pytest.param(125, marks=pytest.mark.heavy)])
async def test_many_groups_are_exact_and_none_is_lost_or_comes_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, batches: int
) -> None:
    batch_size, group_size = 8, 2
    groups = batches * batch_size // group_size
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        env = counting(
            tmp_path, api.address, engine, tokenizer, total_steps=batches, failing_setups=0.1, rollout_attempts=2, broken_item=9
        )
        await trainer.register(batch_size=batch_size, num_steps=batches)
        examiner = Examiner(engine, group_size, batch_size)
        async with serving(env) as task:
            for _ in range(batches):
                examiner.examine(await trainer.batch())
            await asyncio.wait_for(task, PATIENCE_S)
    summary = env.summary
    dropped = summary.groups_dropped
    assert set(dropped) == {"equal scores", "incomplete"}
    # Exactly as many as were needed, and every item that was taken is accounted for.
    assert summary.groups_served == len(set(examiner.items)) == len(examiner.items) == groups
    assert len(env.taken) == groups + sum(dropped.values())
    assert 9 not in examiner.items
    # The policy's own turns had calls in them: rollouts of several turns are among these.
    assert summary.tool_calls > 0


async def test_it_waits_for_a_trainer_and_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        env = counting(tmp_path, api.address, engine, tokenizer)
        async with serving(env):
            # Longer than the pause between two questions, which it asks quietly.
            await until(lambda: "POST /register-env" in api.log.read_text())
            began = time.monotonic()
            await asyncio.sleep(2.5)
            assert capsys.readouterr().out.count("waiting for a trainer to ask it for batches") == 1
            assert 1 <= api.log.read_text().count("POST /register-env") <= 2 + time.monotonic() - began
            assert not engine.requests
            await trainer.register(batch_size=4)
            assert len(await trainer.batch()) == 2


async def test_without_run_api_it_ends_and_says_what_is_missing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    async with Engine(tokenizer, "tinker") as engine:
        env = counting(tmp_path, f"http://127.0.0.1:{free_port()}", engine, tokenizer)
        async with env.running():
            with pytest.raises(ConfigError, match=r"rollout_server_url: no run-api has answered for 0.5 s: http://127.0.0.1:"):
                await Serving(env, api_patience_s=0.5).run()


async def test_something_else_than_run_api_is_told_from_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    async with Engine(tokenizer, "tinker") as engine:
        env = counting(tmp_path, engine.base_url, engine, tokenizer)
        with pytest.raises(RolloutApiError, match="/register-env: HTTP 404"):
            await env.env_manager()


async def test_a_full_queue_is_not_overfilled_and_no_rollout_is_cancelled_for_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker", delay_s=0.05) as engine,
    ):
        env = counting(
            tmp_path,
            api.address,
            engine,
            tokenizer,
            max_batches_offpolicy=2,
            max_num_workers=8,
            ensure_scores_are_not_same=False,
        )
        await trainer.register(batch_size=6, num_steps=100)
        async with serving(env):
            await trainer.queue_of(6)
            await asyncio.sleep(1.0)
            assert (await trainer.get("/status"))["queue_size"] == 6
            assert env.taken == list(range(6))
            # The API makes batches of everything at once.
            await trainer.batch()
            await trainer.queue_of(6)
            await asyncio.sleep(1.0)
            assert env.taken == list(range(12))
        assert not engine.aborted.is_set()


async def test_what_is_finished_when_it_is_stopped_is_still_sent(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        env = counting(tmp_path, api.address, engine, tokenizer, item_seconds=600.0, ensure_scores_are_not_same=False)
        await trainer.register(batch_size=4)
        async with serving(env):
            await until(lambda: env.summary.groups == 1)
            # It waits for the second item, and has had no time to send the first.
            assert (await trainer.get("/status"))["queue_size"] == 0
        assert (await trainer.get("/status"))["queue_size"] == 1


async def test_after_a_restart_of_run_api_everything_comes_that_no_batch_was_made_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_size = 4
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        env = counting(
            tmp_path,
            api.address,
            engine,
            tokenizer,
            total_steps=10,
            grading_seconds=0.5,
            max_num_workers=2,
            ensure_scores_are_not_same=False,
        )
        await trainer.register(batch_size=batch_size)
        examiner = Examiner(engine, 2, batch_size, equal_scores=True)
        async with serving(env) as task:
            examiner.examine(await trainer.batch())
            await trainer.queue_of(1)
            await asyncio.sleep(0.3)
            # One is in the queue, and two more finish while it is gone.
            await api.stop()
            await asyncio.sleep(1.5)
            underway = len(env.taken)
            await api.start()
            await asyncio.sleep(1.5)
            # Groups that it gets now would spoil it for the trainer.
            assert "POST /scored_data" not in api.log.read_text().split("Started server process")[-1]
            assert len(env.taken) == underway
            await trainer.register(batch_size=batch_size, starting_step=1)
            for _ in range(9):
                examiner.examine(await trainer.batch())
            await asyncio.wait_for(task, PATIENCE_S)
    assert sorted(examiner.items) == list(range(20))
    assert capsys.readouterr().out.count("run-api was restarted or reset; registering again") == 1


async def test_batches_that_were_made_but_not_given_out_come_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The API makes batches of all that it has, gives out the last of them, and dies."""
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        env = counting(tmp_path, api.address, engine, tokenizer, max_num_workers=1, ensure_scores_are_not_same=False)
        await trainer.register(batch_size=4)
        examiner = Examiner(engine, 2, 4, equal_scores=True)
        async with serving(env):
            await trainer.queue_of(6)
            examiner.examine(await trainer.batch())
            assert examiner.items == [4, 5]
            # The environment has seen the step.
            await trainer.queue_of(2)
            await api.stop()
            await api.start()
            await trainer.register(batch_size=4, starting_step=1)
            # None of them twice; and sooner or later all.
            while not set(range(10)) <= set(examiner.items):
                examiner.examine(await trainer.batch())


@pytest.mark.parametrize("interval", [0, 1])
async def test_a_checkpoint_counts_on_what_its_trainer_had(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, interval: int
) -> None:
    """Three batches are made at once: a trainer that goes on from the first step has had the last batch alone."""
    folder = tmp_path / "trainer"
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        options = {"total_steps": 3, "max_num_workers": 1, "ensure_scores_are_not_same": False}
        env = counting(tmp_path, api.address, engine, tokenizer, **options)
        await trainer.register(batch_size=4, checkpoint_dir=str(folder), save_checkpoint_interval=interval)
        async with serving(env) as task:
            await trainer.queue_of(6)
            await trainer.batch()
            await asyncio.wait_for(task, PATIENCE_S)
    saved = [json.loads((folder / f"env_checkpoints/counting_0/step-{step}.json").read_text()) for step in (1, 2, 3)]
    assert [file["unfinished"] for file in saved] == [[0, 1, 2, 3], [0, 1], []]
    assert [file["position"] for file in saved] == [6, 6, 6]


async def test_groups_that_are_dropped_again_and_again_are_told_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker", says(tokenizer, "ok<|im_end|>")) as engine,
    ):
        env = counting(tmp_path, api.address, engine, tokenizer, items=40)
        await trainer.register(batch_size=4)
        async with serving(env) as task:
            await asyncio.wait_for(task, PATIENCE_S)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "groups were dropped" in line] == [
        f"counting: {dropped} groups were dropped and 0 served: {{'equal scores': {dropped}}}" for dropped in (16, 32)
    ]


async def test_another_batch_size_after_a_restart_is_used_if_groups_fill_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        env = counting(tmp_path, api.address, engine, tokenizer, ensure_scores_are_not_same=False)
        await trainer.register(batch_size=4)
        async with serving(env) as task:
            await trainer.batch()
            await trainer.queue_of(2)
            await trainer.reset()
            await trainer.register(batch_size=8)
            assert len(await trainer.batch()) == 4
            await trainer.queue_of(2)
            await trainer.reset()
            await trainer.register(batch_size=5)
            with pytest.raises(ConfigError, match=r"group_size: .* batches of 5 sequences, which groups of 2 never fill"):
                await asyncio.wait_for(task, PATIENCE_S)
    # What was finished is not lost with the run.
    [kept] = (tmp_path / "cache/unsent").iterdir()
    groups = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(groups) >= 2
    assert all(len(group["tokens"]) == 2 and "env_id" not in group for group in groups)


async def test_a_rollout_gets_no_longer_than_the_trainer_takes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker", says(tokenizer, "value " * 2000)) as engine,
    ):
        options = {"items": 2, "agent_max_tokens": 2000, "ensure_scores_are_not_same": False}
        env = counting(tmp_path, api.address, engine, tokenizer, **options)
        await trainer.register(batch_size=4, max_token_len=1200)
        async with serving(env):
            batch = await trainer.batch()
    lengths = [len(tokens) for item in batch for tokens in item["tokens"]]
    assert lengths == [1199] * 4


class Lengthening(CountingEnv):
    """Adds to what was recorded."""

    async def postprocess_histories(self, trajectories: Any) -> Any:
        """Make each sequence as long as the trainer's limit."""
        for item in trajectories:
            for tokens, masks, logprobs in zip(item["tokens"], item["masks"], item["inference_logprobs"], strict=True):
                missing = self.max_token_len - len(tokens)
                tokens.extend([0] * missing)
                masks.extend([UNTRAINED_MASK] * missing)
                logprobs.extend([UNTRAINED_LOGPROB] * missing)
        return trajectories


async def test_what_is_longer_than_the_trainer_takes_is_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        options = {"items": 3, "ensure_scores_are_not_same": False}
        env = counting(tmp_path, api.address, engine, tokenizer, kind=Lengthening, **options)
        await trainer.register(batch_size=4, max_token_len=1200)
        async with serving(env) as task:
            await asyncio.wait_for(task, PATIENCE_S)
        assert (await trainer.get("/status"))["queue_size"] == 0
    assert (env.summary.groups_served, env.summary.groups_dropped) == (0, {"too long": 3})
    assert "groups dropped: too long" in capsys.readouterr().out


async def test_a_group_beyond_worker_timeout_is_dropped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        options = {"worker_timeout": 1.0, "tool_timeout_s": 0.5, "acquire_timeout_s": 0.5}
        env = counting(tmp_path, api.address, engine, tokenizer, items=2, grading_seconds=60.0, **options)
        await trainer.register(batch_size=4)
        async with serving(env) as task:
            await asyncio.wait_for(task, PATIENCE_S)
    assert env.summary.groups_dropped == {"worker_timeout of 1 s": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "oracle"}, "env.policy: 'oracle' has no exact tokens"),
        ({"max_batches_offpolicy": 0}, "max_batches_offpolicy"),
        ({"inference_weight": -1.0}, "inference_weight"),
        ({"worker_timeout": 250.0, "tool_timeout_s": 120.0}, r"worker_timeout: 250 s .* within acquire_timeout_s \(300 s\)"),
        ({"worker_timeout": 600.0, "tool_timeout_s": 900.0}, r"worker_timeout: 600 s .* within tool_timeout_s \(900 s\)"),
    ],
)
async def test_options_that_cannot_work_with_a_trainer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], words: str
) -> None:
    async with Engine(tokenizer, "tinker") as engine:
        env = counting(tmp_path, "http://127.0.0.1:9", engine, tokenizer, **options)
        with pytest.raises(ConfigError, match=words):
            await env.env_manager()


async def test_evaluations_come_on_schedule_and_may_fail(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        env = counting(
            tmp_path,
            api.address,
            engine,
            tokenizer,
            total_steps=6,
            steps_per_eval=2,
            evaluation_fails=True,
            evaluation_seconds=0.7,
            max_batches_offpolicy=1,
            ensure_scores_are_not_same=False,
        )
        await trainer.register(batch_size=4)
        async with serving(env) as task:
            for _ in range(6):
                await trainer.batch()
            await asyncio.wait_for(task, PATIENCE_S)
    assert env.evaluated_at == [2, 4, 6]
    assert env.summary.failed_evaluations == 3
    # Nothing begins beside it, as eval_handling says, but what had begun is finished.
    assert env.begun_in_evaluations == 0
    assert not engine.aborted.is_set()
    assert env.taken == list(range(12))


class Gated(CountingEnv):
    """Begins when it is let."""

    gate: asyncio.Event

    async def get_next_item(self) -> int | None:
        """The next number, behind the gate."""
        await self.gate.wait()
        return await super().get_next_item()


async def test_two_environments_share_each_batch_as_they_are_allotted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with (
        RolloutApi(tmp_path / "api.log") as api,
        ScriptedTrainer(api.address) as trainer,
        Engine(tokenizer, "tinker") as engine,
    ):
        options = {"kind": Gated, "ensure_scores_are_not_same": False, "total_steps": 6}
        small = counting(tmp_path, api.address, engine, tokenizer, min_batch_allocation=0.25, wandb_name="small", **options)
        large = counting(tmp_path, api.address, engine, tokenizer, min_batch_allocation=0.75, group_size=4, **options)
        gate = small.gate = large.gate = asyncio.Event()
        await trainer.register(batch_size=16)
        async with serving(small) as one, serving(large) as other:
            # The first to register would have the batches to itself until the other has.
            await until(lambda: api.log.read_text().count("POST /register-env") == 2)
            gate.set()
            for _ in range(2):
                # Three batches each: a quarter of them in groups of 2, the rest in groups of 4.
                await trainer.queue_of(6 + 9)
                for _ in range(3):
                    sizes = [len(group["tokens"]) for group in await trainer.batch()]
                    assert sorted(sizes) == [2, 2, 4, 4, 4]
            await asyncio.wait_for(asyncio.gather(one, other), PATIENCE_S)
