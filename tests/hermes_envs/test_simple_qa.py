"""Five questions without a sandbox: by reference, by nobody, by a chat endpoint, and with exact tokens for a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from atroposlib.envs.base import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.errors import ConfigError
from hermes_envs.simple_qa import QUESTIONS, SimpleQaConfig, SimpleQaEnv
from hermes_envs.tools.external import ExternalTool
from tests.engine.chat import ChatServer, completion
from tests.engine.engine import Engine


def environment(server: APIServerConfig | None = None, kind: type[SimpleQaEnv] = SimpleQaEnv, **options: Any) -> SimpleQaEnv:
    config = SimpleQaConfig.model_validate({"policy": "messages" if server else "oracle", "use_wandb": False, **options})
    return kind(config, [server or APIServerConfig(base_url="")])


def endpoint(chat: ChatServer) -> APIServerConfig:
    return APIServerConfig(base_url=chat.base_url, model_name="tiny", health_check=False)


@pytest.mark.parametrize(("policy", "score"), [("oracle", 1.0), ("nop", 0.0)])
def test_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], policy: str, score: float
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--env.use_wandb=false", "--env.group_size=2", "--env.total_steps=9")
    monkeypatch.setattr("sys.argv", ["simple_qa", "process", f"--env.policy={policy}", *flags])
    with pytest.raises(SystemExit) as ended:
        SimpleQaEnv.cli()
    assert ended.value.code == 0, capsys.readouterr().err
    groups = [json.loads(line) for line in (tmp_path / "data/simple_qa.jsonl").read_text().splitlines()]
    assert [group["scores"] for group in groups] == [[score, score]] * 5
    asked = {group["messages"][0][1]["content"] for group in groups}
    assert asked == {question.text for question in QUESTIONS}


@pytest.mark.parametrize(
    ("said", "score"), [("The capital is PARIS!", 1.0), ("paris", 1.0), ("Par is", 0.0), ("Lyon", 0.0), ("", 0.0)]
)
async def test_an_answer_is_looked_for_in_the_response(said: str, score: float) -> None:
    async with ChatServer(completion(content=said)) as chat:
        env = environment(endpoint(chat))
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
    assert trajectory.score is not None
    assert trajectory.score.value == score
    assert "tools" not in chat.requests[0]


async def test_no_sandbox_is_started(tmp_path: Path) -> None:
    # Where slots would be is no directory: with a sandbox this could not start.
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    env = environment(local_data_dir=str(nowhere / "slots"), group_size=50)
    async with env.running():
        assert env.backend.get_stats().sandboxes == 0
        group = await env.collect_group(await env.get_next_item())
    assert group.scores == [1.0] * 50


async def test_who_had_no_room_for_a_first_turn_is_not_judged() -> None:
    """A limit that is set wrong would otherwise be a reward of 0 for everybody."""
    error = {"message": "max_tokens is too large: 8192. This model's maximum context length is 4096 tokens."}
    async with ChatServer(lambda _: web.json_response({"error": error}, status=400)) as chat:
        env = environment(endpoint(chat), group_size=2)
        async with env.running():
            group = await env.collect_group(await env.get_next_item())
    assert group.scores == []
    assert all("no room for a first turn" in failure.reason for failure in group.failures)
    assert len(group.failures) == 2


async def test_a_place_that_is_none_is_refused() -> None:
    async with (env := environment()).running():
        env.restore_data_position([2, 5])
        for position in ([0, 6], [0, -1], [-1, 0], [3], "05", None, [0, "1"]):
            with pytest.raises(ConfigError, match=r"checkpoint_dir: .* is no place in 5 tasks"):
                env.restore_data_position(position)  # type: ignore[arg-type]
        assert env.data_position() == [2, 5]


def calls(name: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": "{}"}}
    return completion("tool_calls", content="", tool_calls=[call])


async def recite() -> str:
    """More than a model gets to read."""
    return "Paris is a city. " * 3000


class ReciteEnv(SimpleQaEnv):
    """Has a tool, though no slot."""

    own_external_tools = (ExternalTool("recite", "Recite.", {"type": "object"}, recite),)


async def test_calls_are_answered_without_a_slot() -> None:
    async with ChatServer(calls("terminal"), calls("recite"), completion(content="Paris")) as chat:
        env = environment(endpoint(chat), kind=ReciteEnv, tool_server_url="inprocess")
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
    made_up, long = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert made_up == "Error: there is no tool 'terminal'; the tools are recite"
    assert "characters left out; the whole output could not be kept: there is no sandbox" in long
    assert len(long) < 21_000
    assert trajectory.score is not None
    assert trajectory.score.value == 1.0


async def test_tools_are_refused() -> None:
    with pytest.raises(ConfigError, match="enabled_toolsets: simple_qa has no sandbox"):
        async with environment(enabled_toolsets=["terminal"]).running():
            pass


def test_an_endpoint_without_token_ids_is_refused_before_a_tokenizer_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"openai\.server_type: .* sglang or vllm, not openai"):
        environment(APIServerConfig(base_url="http://127.0.0.1:1/v1"), policy="tokens", tokenizer_name="no/such")


async def test_a_trainer_gets_the_questions_over_and_over_with_exact_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    said = tokenizer.encode("It is Paris.<|im_end|>", add_special_tokens=False)
    async with Engine(tokenizer, "tinker", script=lambda prompt: said) as engine:
        server = APIServerConfig(
            server_type="sglang", base_url=engine.base_url, tokenizer_name=tokenizer.name_or_path, health_check=False
        )
        options = {"policy": "tokens", "tokenizer_name": tokenizer.name_or_path, "agent_max_tokens": 50, "group_size": 2}
        env = environment(server, **options)
        async with env.running():
            items = [await env.get_next_item() for _ in range(6)]
            [data], _ = await env.collect_trajectories(items[0])
    assert items[0] == items[5] == QUESTIONS[0]
    assert len(set(items)) == 5
    assert data["scores"] == [1.0, 1.0]
    for tokens, masks in zip(data["tokens"], data["masks"], strict=True):
        assert tokens[-len(said) :] == said
        assert [mask for mask in masks if mask != -100] == said
