"""What every environment gets from its base: tasks, limits, hooks, and who is to blame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig

from hermes_envs.env import AgentEnv, AgentEnvConfig, AgentTask
from hermes_envs.errors import ConfigError, EngineError, EngineRefusalError, EnvironmentBuildError, NotScoredError
from hermes_envs.rollouts.group import Blame
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.tasks.agent_task import TaskLimits
from hermes_envs.tools.call import ToolCall
from hermes_envs.workspace import Workspace
from tests.engine.chat import ChatServer, completion


@dataclass(frozen=True, kw_only=True)
class WordTask(AgentTask):
    """Carries what building it has found out."""

    word: str


class WordEnv(AgentEnv):
    """Write a word into a file."""

    name = "word"
    commands: Sequence[str] = ("printf word > word",)
    limits = TaskLimits()
    setup_seconds = grading_seconds = 0.0
    score_timeouts = True
    problem: Exception | None = None

    def __init__(self, endpoint: APIServerConfig | None = None, **options: Any) -> None:
        defaults = {"policy": "oracle", "use_wandb": False, "local_slots": 2, "group_size": 3, "rollout_attempts": 2}
        super().__init__(AgentEnvConfig.model_validate({**defaults, **options}), [endpoint or APIServerConfig(base_url="")])
        self.built: list[object] = []
        self.tasks: list[WordTask] = []
        self.scored: list[Episode] = []
        self.validated = 0

    async def get_next_item(self) -> str | None:
        return None

    async def build_task(self, item: str) -> WordTask:
        self.built.append(item)
        if self.problem is not None:
            raise self.problem
        reference = [ToolCall(f"c{number}", "terminal", {"command": command}) for number, command in enumerate(self.commands)]
        prompt = [{"role": "user", "content": f"Write {item}."}]
        return WordTask(prompt=prompt, reference=reference, limits=self.limits, word=item)

    async def setup_trajectory_workspace(self, task: WordTask, workspace: Workspace) -> None:
        self.tasks.append(task)
        await asyncio.sleep(self.setup_seconds)

    async def validate_task(self, task: WordTask, workspace: Workspace) -> None:
        self.validated += 1
        if task.word == "nothing":
            raise EnvironmentBuildError("it rewards whoever does nothing")

    async def verify_and_score_trajectory(self, task: WordTask, episode: Episode, workspace: Workspace) -> Score:
        self.tasks.append(task)
        self.scored.append(episode)
        if episode.end == "timeout" and not self.score_timeouts:
            raise NotScoredError("it ran out of time")
        await asyncio.sleep(self.grading_seconds)
        result = await workspace.run("cat word")
        return Score(float(result.output == task.word), "by the file")


async def test_a_task_is_made_once_for_a_group_and_handed_on() -> None:
    env = WordEnv()
    async with env.running():
        group = await env.collect_group("word")
    assert group.scores == [1.0, 1.0, 1.0]
    assert env.built == ["word"]
    assert len(env.tasks) == 6
    assert all(task is env.tasks[0] for task in env.tasks)
    assert env.tasks[0].item == "word"


async def test_one_rollout_of_an_item_or_of_a_task() -> None:
    env = WordEnv()
    async with env.running():
        assert (await env.run_agent("word")).score.value == 1.0
        task = await env.prepare_task("word")
        trajectory = await env.run_agent(task, "mine")
    assert (trajectory.score.value, trajectory.trajectory_id) == (1.0, "mine")
    assert trajectory.messages[0] == {"role": "user", "content": "Write word."}
    assert env.built == ["word", "word"]


async def test_an_agent_that_runs_out_of_time_is_judged_by_what_it_has_done() -> None:
    env = WordEnv(rollout_timeout_s=1.0)
    env.commands = ("printf word > word", "sleep 300", "rm word")
    async with env.running():
        trajectory = await env.run_agent("word")
        # What the agent waited for is gone from the slot, which the next one gets.
        env.commands = ("printf word > word",)
        assert (await env.run_agent("word")).score.value == 1.0
    assert (trajectory.end, trajectory.steps, trajectory.score.value) == ("timeout", 2, 1.0)
    assert [message["role"] for message in trajectory.messages] == ["user", "assistant", "tool", "assistant", "tool"]
    assert "timed out after" in trajectory.messages[-1]["content"]


async def test_a_tasks_own_limit_for_the_agent() -> None:
    env = WordEnv()
    env.commands, env.limits = ("sleep 300",), TaskLimits(agent_s=0.5)
    async with env.running():
        assert (await env.run_agent("word")).end == "timeout"


async def test_an_environment_may_leave_timeouts_without_a_score() -> None:
    env = WordEnv()
    env.commands, env.limits, env.score_timeouts = ("sleep 300",), TaskLimits(rollout_s=0.5), False
    async with env.running():
        group = await env.collect_group("word", 2)
    assert [(failure.blame, failure.reason, failure.attempts) for failure in group.failures] == [
        ("unscored", "it ran out of time", 1)
    ] * 2


@pytest.mark.parametrize("phase", ["setup", "grading"])
async def test_a_hook_beyond_its_limit_is_infrastructure(phase: str) -> None:
    env = WordEnv()
    setattr(env, f"{phase}_seconds", 60.0)
    env.limits = TaskLimits(**{f"{phase}_s": 0.2})
    async with env.running():
        group = await env.collect_group("word", 1)
    [failure] = group.failures
    assert (failure.blame, failure.attempts) == ("infrastructure", 2)
    assert failure.reason.startswith("PhaseTimeoutError: ")


async def test_no_time_for_a_first_turn_is_infrastructure() -> None:
    def never(request: dict[str, Any]) -> object:
        return completion(content="Too late.")

    async with ChatServer(never, delay_s=60.0) as chat:
        endpoint = APIServerConfig(base_url=chat.base_url, model_name="tiny", health_check=False)
        env = WordEnv(endpoint, policy="messages", rollout_timeout_s=0.5)
        async with env.running():
            with pytest.raises(EngineError, match="no time for a first turn: the time of the rollout is over"):
                await env.run_agent("word")


@pytest.mark.parametrize(
    ("problem", "blame", "attempts"),
    [
        (EnvironmentBuildError("no such image"), "task", 1),
        (EngineError("gone"), "infrastructure", 2),
        (KeyError("text"), "defect", 1),
    ],
)
async def test_who_is_to_blame_for_a_task_that_cannot_be_made(problem: Exception, blame: Blame, attempts: int) -> None:
    env = WordEnv()
    env.problem = problem
    async with env.running():
        group = await env.collect_group("word")
    assert [(failure.blame, failure.attempts) for failure in group.failures] == [(blame, attempts)] * 3
    assert len({failure.trajectory_id for failure in group.failures}) == 3
    assert len(env.built) == attempts


async def test_a_policy_that_does_nothing_validates_tasks() -> None:
    idle = WordEnv(policy="nop", group_size=1)
    async with idle.running():
        group = await idle.collect_group("nothing")
        assert (await idle.collect_group("word")).scores == [0.0]
    assert [failure.blame for failure in group.failures] == ["task"]
    busy = WordEnv(group_size=1)
    async with busy.running():
        assert (await busy.collect_group("nothing")).scores == [0.0]
    assert (idle.validated, busy.validated) == (2, 0)


async def test_a_task_that_needs_the_network_is_set_aside_where_agents_have_none() -> None:
    env = WordEnv()
    env.limits = TaskLimits(network=True)
    async with env.running():
        group = await env.collect_group("word", 1)
    [failure] = group.failures
    assert failure.blame == "task"
    assert "allow_network" in failure.reason


async def test_an_environment_without_held_out_items_says_so() -> None:
    env = WordEnv()
    async with env.running():
        with pytest.raises(ConfigError, match="word has no evaluation split"):
            await env.evaluate()


def test_names_of_items() -> None:
    env = WordEnv()
    row = {"question": "How many?" * 100, "answer": "2"}
    assert [env.item_name(item) for item in (7, "word", "a-1.b_2")] == ["7", "word", "a-1.b_2"]
    digests = [env.item_name(item) for item in (row, dict(row), {**row, "answer": "3"}, "../etc", "a b", ("a", 1), "x" * 65)]
    assert all(len(digest) == 16 and digest.isalnum() for digest in digests)
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1


@pytest.mark.parametrize("value", [None, "word"])
async def test_the_final_response_alone(value: str | None) -> None:
    class Answer(WordEnv):
        verify_and_score_trajectory: Callable[..., Any] = AgentEnv.verify_and_score_trajectory

        async def score_trajectory(self, item: str, final_response: str) -> float:
            return float(item == value and "reference" in final_response)

    env = Answer()
    async with env.running():
        assert (await env.run_agent("word")).score.value == float(value is not None)


@pytest.mark.parametrize("network", [None, False])
async def test_a_task_may_do_without_the_network_that_others_have(network: bool | None) -> None:
    class Curious(WordEnv):
        proxy = ""

        async def setup_trajectory_workspace(self, task: WordTask, workspace: Workspace) -> None:
            self.proxy = (await workspace.run('printf %s "$HTTPS_PROXY$https_proxy"')).output

    env = Curious(allow_network=True)
    env.limits = TaskLimits(network=network)
    async with env.running():
        await env.run_agent("word")
    assert bool(env.proxy) == (network is None)


async def test_a_limit_that_no_slot_can_keep_sets_the_task_aside() -> None:
    env = WordEnv()
    env.limits = TaskLimits(memory_bytes=1)
    async with env.running():
        group = await env.collect_group("word", 1)
    assert [failure.blame for failure in group.failures] == ["task"]


async def test_an_engine_that_can_only_fail_again_is_asked_once_and_the_group_with_it() -> None:
    env = WordEnv()
    env.problem = EngineRefusalError("no such model")
    async with env.running():
        group = await env.collect_group("word", 2)
    assert len(env.built) == 1
    assert not group.may_be_tried_again


@pytest.mark.parametrize("result", [1.0, None, float("nan"), float("inf")])
async def test_a_score_that_is_none_is_a_defect_of_the_environment(result: Any) -> None:
    class Careless(WordEnv):
        async def verify_and_score_trajectory(self, task: WordTask, episode: Episode, workspace: Workspace) -> Score:
            return result if result in (1.0, None) else Score(result, "no number")

    env = Careless()
    async with env.running():
        group = await env.collect_group("word", 1)
    assert [failure.blame for failure in group.failures] == ["defect"]


def test_details_of_a_score_go_into_a_file() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        Score(1.0, "right", {"path": object()})


@pytest.mark.parametrize("task", [None, {"prompt": []}, "text"])
async def test_what_is_no_task_is_a_defect_of_the_environment(task: Any) -> None:
    class Careless(WordEnv):
        async def build_task(self, item: str) -> WordTask:
            return WordTask(prompt="text", word="w") if task == "text" else task  # type: ignore[arg-type]

    env = Careless()
    async with env.running():
        group = await env.collect_group("word", 1)
    [failure] = group.failures
    assert failure.blame == "defect"
    assert "not an AgentTask" in failure.reason or "list of messages" in failure.reason
