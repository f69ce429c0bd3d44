"""pass@k, and evaluations of real rollouts: what is measured, what is written down, and what is left alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from atroposlib.envs.base import APIServerConfig

from hermes_envs.errors import ConfigError, NothingCollectedError
from hermes_envs.gsm8k_agent import Gsm8kAgentEnv
from hermes_envs.policies.token_record import TokenRecord
from hermes_envs.rollouts.group import FailedRollout, Group
from hermes_envs.rollouts.trajectory import Score, Stopwatch, ToolCounts, Trajectory
from hermes_envs.runs.evaluation import Evaluation, evaluate, pass_at_k
from hermes_envs.simple_qa import QUESTIONS, SimpleQaConfig, SimpleQaEnv
from tests.engine.chat import Answer, ChatServer, completion
from tests.hermes_envs.test_gsm8k_agent import environment as gsm8k_environment


@pytest.mark.parametrize(("rollouts", "solved"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_rollouts_that_have_a_solved_one(rollouts: int, solved: int) -> None:
    outcomes = [True] * solved + [False] * (rollouts - solved)
    for k in range(1, rollouts + 1):
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at_k(rollouts, solved, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def group(*scores: float, failures: int = 0) -> Group:
    trajectories = [
        Trajectory(f"t-{number}", [], TokenRecord(f"t-{number}"), "stop", 1, ToolCounts(), Stopwatch(), Score(score, ""))
        for number, score in enumerate(scores)
    ]
    lost = [FailedRollout(f"f-{number}", "gone", 1) for number in range(failures)]
    return Group("g", tuple(trajectories), tuple(lost))


def test_infrastructure_errors_are_no_failures_of_the_policy() -> None:
    evaluation = Evaluation(rollouts_per_item=6)
    for one in (group(1, 1, 0, 0, 0, 0), group(1, 0, failures=4), group(0.9, failures=5), group(failures=6)):
        evaluation.add(one)
    assert evaluation.pass_at() == {
        1: (pytest.approx((2 / 6 + 1 / 2 + 0) / 3), 3),
        2: (pytest.approx((1 - math.comb(4, 2) / math.comb(6, 2) + 1) / 2), 2),
        4: (pytest.approx(1 - math.comb(4, 4) / math.comb(6, 4)), 1),
        6: (1.0, 1),
    }
    metrics = evaluation.metrics()
    assert metrics["eval/infrastructure_errors"] == 15
    assert (metrics["eval/items"], metrics["eval/rollouts"]) == (3, 9)
    assert metrics["eval/mean_score"] == pytest.approx((2 + 1 + 0.9) / 9)
    assert metrics["eval/pass@1"] == pytest.approx(evaluation.pass_at_1)


def question(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


class Pupil:
    """Answers the first `knows[i]` of the rollouts of question i rightly, and has no answer but an error for `silent` ones."""

    def __init__(self, *knows: int, silent: int | None = None) -> None:
        self._left = {one.text: number for one, number in zip(QUESTIONS, knows, strict=True)}
        self._silent = None if silent is None else QUESTIONS[silent].text
        self.asked: Counter[str] = Counter()

    def __call__(self, request: dict[str, Any]) -> object:
        asked = question(request)
        self.asked[asked] += 1
        if asked == self._silent:
            return web.json_response({"error": {"message": "broken"}}, status=400)
        self._left[asked] -= 1
        answer = next(one.answer for one in QUESTIONS if one.text == asked)
        return completion(content=f"I think {answer}." if self._left[asked] >= 0 else "No idea.")


def environment(chat: ChatServer, **options: Any) -> SimpleQaEnv:
    defaults = {"policy": "messages", "use_wandb": False, "group_size": 2, "rollout_attempts": 1, "group_attempts": 1}
    config = SimpleQaConfig.model_validate({**defaults, **options})
    return SimpleQaEnv(config, [APIServerConfig(base_url=chat.base_url, model_name="tiny", health_check=False)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_an_evaluation_measures_and_writes_down_each_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pupil = Pupil(4, 2, 1, 0, 4, silent=4)
    async with ChatServer(pupil) as chat:
        env = environment(chat, eval_group_size=4, data_dir_to_save_evals=str(tmp_path / "evals"))
        async with env.running():
            await env.get_next_item()
            env.curr_step = 7
            evaluation = await evaluate(env, QUESTIONS, env.config)
            # The trainer's side of the environment is as it was.
            assert (env.config.group_size, env.data_position(), env.summary.groups) == (2, [0, 1], 0)
            await env.evaluate()
    assert evaluation.pass_at() == {
        1: (pytest.approx((1 + 1 / 2 + 1 / 4 + 0) / 4), 4),
        2: (pytest.approx((1 + 5 / 6 + 1 / 2 + 0) / 4), 4),
        4: (pytest.approx(3 / 4), 4),
    }
    assert pupil.asked[QUESTIONS[0].text] == 8
    printed = capsys.readouterr().out
    assert "simple_qa evaluation group 5" in printed
    assert "│ pass@4" in printed
    assert "│ infrastructure errors       │ 4" in printed
    items, evaluations = lines(tmp_path / "evals/items.jsonl"), lines(tmp_path / "evals/evaluations.jsonl")
    # Both evaluations are there, and the question without an answer is no item with a score.
    assert len(items) == 8
    [first, second] = evaluations
    assert first["metrics"]["pass@4"] == 0.75
    assert second["metrics"]["pass@4"] == 0.0
    assert (first["step"], first["policy"], len(first["infrastructure_errors"])) == (7, "messages", 4)
    of_first = {item["item"]: item for item in items[:4]}
    assert {item["evaluation"] for item in items[:4]} == {first["evaluation"]}
    assert [rollout["score"] for rollout in of_first["question-2"]["rollouts"]].count(1.0) == 2
    assert {rollout["final_response"] for rollout in of_first["question-4"]["rollouts"]} == {"No idea."}


async def test_without_an_option_the_group_size_and_all_items_are_taken() -> None:
    pupil = Pupil(0, 0, 0, 0, 0)
    async with ChatServer(pupil) as chat:
        env = environment(chat, group_size=3)
        async with env.running():
            await env.evaluate()
            assert set(pupil.asked.values()) == {3}
            env.config.num_eval_tasks = 2
            await env.evaluate()
    assert sorted(pupil.asked.values()) == [3, 3, 3, 6, 6]


async def test_groups_of_a_trainer_keep_their_size_while_an_evaluation_runs() -> None:
    def slowly(request: dict[str, Any]) -> object:
        return completion(content="Paris")

    async with ChatServer(slowly, delay_s=0.05) as chat:
        env = environment(chat, eval_group_size=5)
        async with env.running():
            evaluating = asyncio.create_task(evaluate(env, QUESTIONS, env.config))
            groups = [await env.collect_group(await env.get_next_item()) for _ in range(4)]
            evaluation = await evaluating
    assert [len(one.trajectories) for one in groups] == [2] * 4
    assert [rollouts for rollouts, _ in evaluation.outcomes] == [5] * 5


@pytest.mark.parametrize("answer", [lambda request: web.json_response({"error": {"message": "broken"}}, status=400)])
async def test_an_evaluation_of_nothing_is_an_error(answer: Answer, tmp_path: Path) -> None:
    async with ChatServer(answer) as chat:
        env = environment(chat, data_dir_to_save_evals=str(tmp_path / "evals"))
        async with env.running():
            with pytest.raises(NothingCollectedError):
                await env.evaluate()
    assert not (tmp_path / "evals/evaluations.jsonl").exists()


async def test_a_cancelled_evaluation_keeps_what_it_has_and_lets_go_of_the_rest(tmp_path: Path) -> None:
    third_question = asyncio.Event()

    def answer(request: dict[str, Any]) -> object:
        if question(request) == QUESTIONS[2].text:
            third_question.set()
        return completion(content="Paris")

    async with ChatServer(answer, delay_s=0.1) as chat:
        env = environment(chat, data_dir_to_save_evals=str(tmp_path / "evals"), max_concurrent_groups=1)
        async with env.running():
            evaluating = asyncio.create_task(env.evaluate())
            await third_question.wait()
            evaluating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await evaluating
            assert not [task for task in asyncio.all_tasks() if task.get_name().startswith(("rollout", "group"))]
    assert 2 <= len(lines(tmp_path / "evals/items.jsonl")) <= 3


def test_wandb_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a trainer's metrics of the same step, which are neither reported nor forgotten."""
    wandb = pytest.importorskip("wandb")

    async def run() -> list[int]:
        async with ChatServer(Pupil(1, 1, 1, 0, 0)) as chat:
            env = environment(chat, use_wandb=True, group_size=1)
            env.wandb_prepend, env.curr_step, env.completion_lengths = "simple_qa_0", 3, [5]
            async with env.running():
                await env.evaluate()
            return list(env.completion_lengths)

    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True)) as logged:
        lengths = asyncio.run(run())
        # A step is complete when the next one begins.
        wandb.log({}, step=4)
        figures = dict(logged.summary)
    wandb.teardown()
    assert lengths == [5]
    assert figures["simple_qa_0_eval/pass@1"] == pytest.approx(0.6)
    assert figures["simple_qa_0_eval/rollouts"] == 5
    assert figures["_step"] == 3


def test_the_command_line_evaluates_held_out_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--env.policy=oracle", "--env.use_wandb=false", "--env.local_slots=2", "--env.data_dir_to_save_evals=evals")
    more = ("--env.eval_group_size=2", "--env.num_eval_tasks=2")
    monkeypatch.setattr("sys.argv", ["gsm8k_agent", "evaluate", *flags, *more])
    with pytest.raises(SystemExit) as ended:
        Gsm8kAgentEnv.cli()
    assert ended.value.code == 0
    assert "│ pass@2                      │ 1.000" in capsys.readouterr().out
    assert [len(item["rollouts"]) for item in lines(tmp_path / "evals/items.jsonl")] == [2, 2]


async def test_nothing_held_out_is_said() -> None:
    env = gsm8k_environment(eval_split_ratio=0)
    async with env.running():
        with pytest.raises(ConfigError, match="eval_split_ratio: no problem is held out"):
            await env.evaluate()
