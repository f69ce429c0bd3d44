"""The smoke environment, with the reference solution, without one, and with models that do it right and wrong."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig

from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.smoke import SmokeConfig, SmokeEnv
from hermes_envs.tool_server import ToolServer, ToolServerServiceOptions
from hermes_envs.tools.external import ExternalTool, ExternalToolbox
from hermes_envs.tools.sha256 import SHA256
from tests.engine.chat import ChatServer, completion

ROOT = Path(__file__).parent.parent.parent


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    """The command line, as a user would type it: exit status and what it said."""
    monkeypatch.setattr("sys.argv", ["smoke", *arguments])
    with pytest.raises(SystemExit) as ended:
        SmokeEnv.cli()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(monkeypatch, capsys, *arguments, "--env.use_wandb=false", "--env.local_slots=2")


@pytest.mark.parametrize("external", [(), ("--env.tool_server_url=inprocess",)])
@pytest.mark.parametrize(("policy", "score"), [("oracle", 1.0), ("nop", 0.0)])
def test_process(smoke: Callable[..., Any], tmp_path: Path, policy: str, score: float, external: tuple[str, ...]) -> None:
    status, said, errors = smoke("process", f"--env.policy={policy}", "--env.total_steps=2", "--env.group_size=2", *external)
    assert status == 0, errors
    assert f"{score:.3f}" in said
    groups = [json.loads(line) for line in (tmp_path / "data/smoke.jsonl").read_text().splitlines()]
    assert [group["scores"] for group in groups] == [[score, score]] * 2
    # Each group has a token of its own, which nobody is told.
    prompts = {json.dumps(group["messages"][0][0]) for group in groups}
    assert len(prompts) == 1
    answers = {group["messages"][0][-1]["content"] for group in groups}
    assert len(answers) == (2 if score else 1)
    calls = 2 if external else 1
    assert groups[0]["overrides"][0]["tool_calls_executed_ok"] == (calls if score else 0)


@pytest.mark.parametrize(("policy", "score"), [("oracle", "1.000"), ("nop", "0.000")])
def test_evaluate(smoke: Callable[..., Any], policy: str, score: str) -> None:
    status, said, errors = smoke("evaluate", f"--env.policy={policy}", "--env.num_eval_tasks=3", "--env.group_size=1")
    assert status == 0, errors
    assert "smoke evaluation group 3: smoke-" in said
    assert score in said


def test_the_shipped_configuration_works(smoke: Callable[..., Any], tmp_path: Path) -> None:
    status, said, errors = smoke("process", "--config", str(ROOT / "configs/smoke.yaml"))
    assert status == 0, errors
    assert "1.000" in said
    assert (tmp_path / "data/smoke.html").stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env.enabled_toolsets=filesystem",), "enabled_toolsets: smoke needs one of the tools terminal"),
        (("--env.tool_server_url=localhost",), "tool_server_url: 'localhost' is neither a URL"),
        (("--env.tool_server_url=http://127.0.0.1:9",), "the tool server http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_cannot_work_is_one_line(smoke: Callable[..., Any], flags: tuple[str, ...], words: str) -> None:
    status, _, errors = smoke("process", "--env.policy=oracle", *flags)
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert status == 1
    assert len(told) == 1
    assert words in told[0]


# --- with a model ------------------------------------------------------------------------------------------------------


def calls(name: str, **arguments: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return completion("tool_calls", content="", tool_calls=[call])


def seen(request: dict[str, Any]) -> str:
    """The token that the model has got to see."""
    return str(next(message["content"] for message in request["messages"] if message["role"] == "tool"))


LOOK = calls("terminal", command="cat token.txt")


def by_the_turn(request: dict[str, Any]) -> object:
    """A model that does the right thing in any number of conversations."""
    answer = RIGHT[sum(message["role"] == "tool" for message in request["messages"])]
    return answer(request) if callable(answer) else answer


RIGHT = (LOOK, lambda request: calls("sha256", text=seen(request)), lambda request: completion(content=f" {seen(request)}\n"))


def environment(chat: ChatServer, **options: Any) -> SmokeEnv:
    config = SmokeConfig.model_validate({"policy": "messages", "use_wandb": False, "local_slots": 1, **options})
    return SmokeEnv(config, [APIServerConfig(base_url=chat.base_url, model_name="tiny", health_check=False)])


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (RIGHT, "the token was repeated"),
        ((*RIGHT[:2], lambda request: completion(content=f"It is {seen(request)}")), "the final response is not the token"),
        ((LOOK, lambda request: completion(content=seen(request))), "the external tool was not called with the token"),
        ((LOOK, calls("sha256", text="x"), lambda request: completion(content=seen(request))), "the external tool was not"),
        ((calls("terminal", command="echo 0"), completion(content="0")), "the command did not print the token"),
        ((completion(content="0" * 32),), "the command did not print the token"),
    ],
)
async def test_a_model_is_scored_for_what_it_did(answers: Any, reason: str) -> None:
    async with ChatServer(*answers) as chat:
        env = environment(chat, tool_server_url="inprocess")
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
        assert trajectory.score is not None
        assert trajectory.score.value == float(answers is RIGHT)
        assert trajectory.score.reason.startswith(reason)
        assert [tool["function"]["name"] for tool in chat.requests[0]["tools"]] == ["terminal", "sha256"]
        assert not re.search("[0-9a-f]{32}", json.dumps(chat.requests[0]["messages"]))


@asynccontextmanager
async def tool_server(*tools: ExternalTool) -> AsyncIterator[str]:
    server = ToolServer(ExternalToolbox(tools), ToolServerServiceOptions(port=0))
    async with server.service.listening() as port:
        yield f"http://127.0.0.1:{port}"


async def test_a_tool_server_can_be_elsewhere() -> None:
    async with ChatServer(*RIGHT) as chat, tool_server(SHA256) as url:
        env = environment(chat, tool_server_url=url)
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
        assert trajectory.score is not None
        assert trajectory.score.value == 1.0


async def test_a_tool_server_without_the_tool_is_refused() -> None:
    async with ChatServer(LOOK) as chat, tool_server() as url:
        with pytest.raises(ConfigError, match="smoke calls the tool 'sha256', which the server does not have"):
            async with environment(chat, tool_server_url=url).running():
                pass


async def test_a_tool_server_that_vanishes_is_an_infrastructure_failure_and_no_score() -> None:
    async with AsyncExitStack() as run, AsyncExitStack() as server:
        chat = await run.enter_async_context(ChatServer(by_the_turn))
        url = await server.enter_async_context(tool_server(SHA256))
        env = environment(chat, tool_server_url=url, group_size=1, rollout_attempts=2)
        async with env.running():
            assert (await env.collect_group(await env.get_next_item())).scores == [1.0]
            await server.aclose()
            with pytest.raises(ToolServerError):
                await env.run_agent(await env.get_next_item())
            group = await env.collect_group(await env.get_next_item())
        assert group.scores == []
        [failure] = group.failures
        assert failure.attempts == 2
        assert "ToolServerError" in failure.reason
