"""The environment with a model behind it, and with every form of row."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.errors import NothingCollectedError
from hermes_envs.policies.token_record import UNTRAINED_LOGPROB, UNTRAINED_MASK
from hermes_envs.rollouts.trajectory import Trajectory
from hermes_envs.swe_smith import SweSmithConfig, SweSmithEnv
from tests.engine.chat import ChatServer, completion
from tests.engine.engine import Dialect, Engine
from tests.support.small_task import FILES, SOLUTION, git, write_task_folder

FIX = "sed -i 's/(len(values) + 1)/len(values)/' calc/core.py"


def environment(folder: Path, server: APIServerConfig | None = None, process: int = 0, **options: Any) -> SweSmithEnv:
    """The environment on the small task, as the command line would make it; `process` is how many groups to collect."""
    defaults = {
        "dataset_name": str(folder / "tasks"),
        "policy": "oracle",
        "use_wandb": False,
        "local_slots": 2,
        "cache_directory": str(folder / "cache"),
        "data_path_to_save_groups": str(folder / "groups.jsonl"),
        "ensure_scores_are_not_same": False,
        "include_messages": True,
    }
    config = SweSmithConfig.model_validate({**defaults, **options})
    made = SweSmithEnv(config, [server or APIServerConfig(base_url="")])
    made.process_mode = process > 0
    made.n_groups_to_process, made.group_size_to_process = process, config.group_size
    return made


def groups(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]


@asynccontextmanager
async def first_trajectory(env: SweSmithEnv) -> AsyncIterator[Trajectory]:
    async with env.running():
        yield await env.run_agent(await env.get_next_item())
    env.jsonl_writer.close()


def repairs(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int]], list[int]]:
    """A model that repairs the small task with one call and then says so."""
    call = json.dumps({"name": "terminal", "arguments": {"command": FIX}})

    def script(prompt: list[int]) -> list[int]:
        answered = "<tool_response>" in tokenizer.decode(prompt)
        text = "It is repaired.<|im_end|>" if answered else f"Let me see.\n<tool_call>\n{call}\n</tool_call><|im_end|>"
        return tokenizer.encode(text, add_special_tokens=False)

    return script


@pytest.mark.parametrize("dialect", ["sglang", "vllm", "tinker"])
async def test_tokens_from_an_engine_become_exact_training_data(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, dialect: Dialect
) -> None:
    write_task_folder(tmp_path / "tasks")
    async with Engine(tokenizer, dialect, script=repairs(tokenizer)) as engine:
        server = APIServerConfig(
            server_type="vllm" if dialect == "vllm" else "sglang",
            base_url=engine.base_url,
            model_name="tiny",
            tokenizer_name=tokenizer.name_or_path,
            health_check=False,
        )
        env = environment(
            tmp_path,
            server,
            process=1,
            policy="tokens",
            tokenizer_name=tokenizer.name_or_path,
            group_size=2,
            agent_max_tokens=300,
        )
        await env.process_manager()
    [group] = groups(tmp_path)
    assert group["scores"] == [1.0, 1.0]
    assert group["group_overrides"] == {"group_size": 2, "segment": 0}
    told = {exchange.prompt_ids + exchange.output_ids: exchange for exchange in engine.exchanges}
    for tokens, masks, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True):
        last = told[tuple(tokens)]
        assert tuple(masks[-len(last.output_ids) :]) == last.output_ids
        assert tuple(logprobs[-len(last.output_ids) :]) == pytest.approx(last.logprobs)
        sampled = sum(len(exchange.output_ids) for prompt, exchange in told.items() if tuple(tokens[: len(prompt)]) == prompt)
        assert sum(mask != UNTRAINED_MASK for mask in masks) == sampled
        assert all(
            (mask == UNTRAINED_MASK) == (logprob == UNTRAINED_LOGPROB) for mask, logprob in zip(masks, logprobs, strict=True)
        )


async def test_messages_from_a_chat_endpoint(tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks")
    call = {"id": "a", "type": "function", "function": {"name": "terminal", "arguments": json.dumps({"command": FIX})}}
    answers = (completion("tool_calls", content=None, tool_calls=[call]), completion(content="It is repaired."))
    async with ChatServer(*answers) as endpoint:
        server = APIServerConfig(base_url=endpoint.base_url, model_name="tiny")
        await environment(tmp_path, server, process=1, policy="messages", group_size=1).process_manager()
    [group] = groups(tmp_path)
    assert (group["scores"], group["tokens"]) == ([1.0], [[]])
    assert [message["role"] for message in group["messages"][0]] == ["system", "user", "assistant", "tool", "assistant"]
    assert {tool["function"]["name"] for tool in endpoint.requests[0]["tools"]} == {"terminal", "read_file", "write_file"}


async def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks", rows=9)
    server = APIServerConfig(base_url="http://127.0.0.1:9/v1", model_name="tiny")
    env = environment(tmp_path, server, process=9, policy="messages", group_size=1, rollout_attempts=1, group_attempts=1)
    with pytest.raises(NothingCollectedError, match=r"first 4 groups failed.*http://127.0.0.1:9/v1"):
        await env.process_manager()
    assert env.summary.trajectories == 0
    assert env.summary.infrastructure_errors >= 4


async def test_a_model_that_says_nothing_scores_nothing(tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks")
    async with ChatServer(completion(content="")) as endpoint:
        server = APIServerConfig(base_url=endpoint.base_url, model_name="tiny")
        async with first_trajectory(environment(tmp_path, server, policy="messages")) as trajectory:
            assert trajectory.score is not None
            assert (trajectory.score.value, trajectory.score.reason) == (0.0, "no tool was called")


async def test_a_full_disk_is_the_agents_own_doing(tmp_path: Path) -> None:
    """What fits no longer is told to the model; the trajectory is judged, and the next one has its room again."""
    write_task_folder(tmp_path / "tasks")
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "terminal", "arguments": json.dumps({"command": "cat /dev/zero > /tmp/big"})},
    }
    answers = (completion("tool_calls", content=None, tool_calls=[call]), completion(content="It is full."))
    async with ChatServer(*answers) as endpoint:
        server = APIServerConfig(base_url=endpoint.base_url, model_name="tiny")
        env = environment(tmp_path, server, policy="messages", tool_timeout_s=60)
        async with first_trajectory(env) as trajectory:
            assert trajectory.tool_counts.exec_error == 1
            assert "No space left" in str(trajectory.messages)
            assert trajectory.score is not None
            assert trajectory.score.value == 0.0


async def test_rows_of_swe_smith_itself(tmp_path: Path) -> None:
    """The patch is the bug, the branch bears the instance's name, and its last commit takes the failing tests away."""
    folder = write_task_folder(tmp_path / "tasks", image_name="swesmith.x86_64.small_1776_calc", base_commit=None)
    work = folder / "work"
    (work / "tests/test_core.py").write_text(
        FILES["tests/test_core.py"].split("@pytest")[0]
        + "def test_spread(spread_of):\n    assert spread([1, 4]) == spread_of\n"
    )
    git(work, "commit", "--quiet", "--all", "-m", "Remove F2P Tests")
    git(work, "push", "--quiet", "../repositories/small/calc.git", "main:small__calc.0")
    bug = (
        SOLUTION.replace("\n-    return", "\n#    return")
        .replace("\n+    return", "\n-    return")
        .replace("\n#    return", "\n+    return")
    )
    row = json.loads((folder / "tasks.jsonl").read_text()) | {
        "patch": bug,
        "FAIL_TO_PASS": json.dumps(["tests/test_core.py::test_mean[two values]"]),
    }
    (folder / "tasks.jsonl").write_text(json.dumps(row) + "\n")
    async with first_trajectory(environment(tmp_path)) as trajectory:
        assert trajectory.score is not None
        assert trajectory.score.value == 1.0, trajectory.score


async def test_tests_that_take_too_long_score_nothing(tmp_path: Path) -> None:
    write_task_folder(
        tmp_path / "tasks", patch=SOLUTION.replace("+    return", "+    while True: pass\n+    return").replace("+1,5", "+1,6")
    )
    async with first_trajectory(environment(tmp_path, test_timeout_s=3)) as trajectory:
        assert trajectory.score is not None
        assert (trajectory.score.value, trajectory.score.reason) == (0.0, "the tests took longer than 3 s")


async def test_the_order_of_tasks_is_seeded_and_a_trainer_gets_them_again(tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks", rows=6)

    async def order(count: int, **options: Any) -> list[str]:
        env = environment(tmp_path, process=options.pop("process", 0), **options)
        async with env.running():
            items = [await env.get_next_item() for _ in range(count)]
        env.jsonl_writer.close()
        return [item.instance_id[-1] if item else "none" for item in items]

    first = await order(12, seed=1)
    assert first == await order(12, seed=1)
    assert first != await order(12, seed=2)
    assert sorted(first[:6]) == sorted(first[6:]) == list("012345")
    assert first[:6] != first[6:]
    assert await order(4, shuffle=False, max_items=3, process=1) == ["0", "1", "2", "none"]
