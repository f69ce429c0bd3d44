"""The inference server, with the real SDK and a Tinker-compatible service behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from atroposlib.envs.base import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.endpoints import Endpoints
from hermes_envs.policies.token_endpoint import TokenEndpoint
from hermes_envs.policies.token_engine import TokenEngine
from hermes_envs.rendering.choice import create_chat_renderer
from hermes_envs.services.options import ServiceOptions
from hermes_envs.tools.toolsets import Toolsets
from hermes_envs.train.inference import InferenceServer
from tests.support.waiting import PATIENCE_S
from tests.train.walk import PROMPT
from tests.train.walker import TOOLSET

pytest.importorskip("torch")
pytest.importorskip("tinker")

TOOLS = [tool.schema for tool in Toolsets().resolve(TOOLSET, []).values()]


@dataclass(frozen=True)
class Served:
    """A server with a model, its address, and what it decodes with."""

    server: InferenceServer
    address: str
    tokenizer: PreTrainedTokenizerFast
    stop_service: Any

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.post(self.address + path, json=body) as reply:
            return reply.status, await reply.json()


@asynccontextmanager
async def serving(walker: Path, **tinker: Any) -> AsyncIterator[Served]:
    from tests.train.models import model_of_a_service

    tokenizer = PreTrainedTokenizerFast.from_pretrained(walker)
    server = InferenceServer("walker", tokenizer, lambda: create_chat_renderer(tokenizer, "llama-3"), ServiceOptions())
    async with server.service.listening() as port, model_of_a_service(walker, **tinker) as (model, service):
        server.use(model)
        yield Served(server, f"http://127.0.0.1:{port}", tokenizer, service.__aexit__)


@pytest_asyncio.fixture
async def served(walker: Path) -> AsyncIterator[Served]:
    async with serving(walker) as served:
        yield served


async def test_generate_gives_tokens_logprobs_and_why_it_ended(served: Served) -> None:
    ids = served.tokenizer.encode("north", add_special_tokens=False)
    status, reply = await served.post("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 5, "stop": []}})
    assert status == 200
    meta = reply["meta_info"]
    logprobs, tokens = (
        [entry[0] for entry in meta["output_token_logprobs"]],
        [entry[1] for entry in meta["output_token_logprobs"]],
    )
    assert meta["prompt_tokens"] == len(ids)
    assert meta["completion_tokens"] == len(tokens) == len(logprobs)
    assert all(logprob <= 0 for logprob in logprobs)
    assert reply["text"] == served.tokenizer.decode(tokens, skip_special_tokens=True)


async def test_truncation_is_told_from_an_end(served: Served) -> None:
    end = served.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    parameters = {"max_new_tokens": 2, "n": 60, "stop": ["<|eot_id|>"], "stop_token_ids": [end]}
    status, replies = await served.post("/generate", {"input_ids": [1, 2], "sampling_params": parameters})
    assert (status, len(replies)) == (200, 60)
    ends = set()
    for reply in replies:
        tokens = [entry[1] for entry in reply["meta_info"]["output_token_logprobs"]]
        reason = reply["meta_info"]["finish_reason"]["type"]
        assert reason == ("stop" if tokens[-1] == end else "length")
        assert end not in tokens[:-1]
        ends.add(reason)
    assert ends == {"stop", "length"}


async def test_the_vocabulary_is_looked_up_once(walker: Path) -> None:
    """For a large one that takes longer than the rest of a request, and others wait meanwhile."""
    from tests.train.models import model_of_a_service

    class Counting(PreTrainedTokenizerFast):
        lookups = 0

        def get_vocab(self) -> dict[str, int]:
            type(self).lookups += 1
            return super().get_vocab()

    tokenizer = Counting.from_pretrained(walker)
    server = InferenceServer("walker", tokenizer, lambda: create_chat_renderer(tokenizer, "llama-3"), ServiceOptions())
    async with server.service.listening() as port, model_of_a_service(walker) as (model, service):
        server.use(model)
        served = Served(server, f"http://127.0.0.1:{port}", tokenizer, service.__aexit__)
        counts = []
        for _ in range(3):
            parameters = {"max_new_tokens": 2, "stop": ["<|eot_id|>"], "stop_token_ids": [5]}
            status, _ = await served.post("/generate", {"input_ids": [1, 2], "sampling_params": parameters})
            assert status == 200
            counts.append(Counting.lookups)
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


async def test_the_environments_engine_can_use_it(served: Served) -> None:
    config = APIServerConfig(
        server_type="sglang",
        base_url=f"{served.address}/v1",
        api_key="none",
        model_name="walker",
        health_check=False,
    )
    renderer = create_chat_renderer(served.tokenizer, "llama-3")
    async with aclosing(Endpoints([TokenEndpoint(config)])) as endpoints:
        engine = TokenEngine(endpoints, renderer, 1.0)
        samples = await asyncio.gather(
            *(engine.sample(renderer.prompt([{"role": "user", "content": PROMPT}], TOOLS), 3) for _ in range(20))
        )
    assert {sample.truncated for sample in samples} == {True, False}


async def test_chat_completions_have_tool_calls_and_usage(served: Served) -> None:
    body = {"model": "x", "messages": [{"role": "user", "content": PROMPT}], "tools": TOOLS, "n": 60, "max_tokens": 2}
    status, reply = await served.post("/v1/chat/completions", body)
    assert status == 200
    calls = [choice for choice in reply["choices"] if choice["finish_reason"] == "tool_calls"]
    assert calls
    function = calls[0]["message"]["tool_calls"][0]["function"]
    assert function["name"] == "terminal"
    assert "sh walk" in function["arguments"]
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 120


async def test_completions_answer_each_prompt(served: Served) -> None:
    status, reply = await served.post("/v1/completions", {"prompt": ["north", "east"], "n": 2, "max_tokens": 3, "stop": "\n"})
    assert status == 200
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in reply["choices"]} <= {"stop", "length"}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/generate", {}, "input_ids"),
        ("/generate", {"text": "north"}, "text"),
        ("/generate", {"input_ids": []}, "input_ids"),
        ("/generate", {"input_ids": [1, 100_000]}, "100000"),
        ("/generate", {"input_ids": ["a"] * 1000}, "input_ids"),
        ("/generate", {"input_ids": [True]}, "input_ids"),
        ("/generate", {"input_ids": [1], "sampling_params": []}, "sampling_params"),
        ("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1000}}, "context window"),
        ("/generate", {"input_ids": [1], "sampling_params": {"min_p": 0.1}}, "min_p"),
        ("/generate", {"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature"),
        ("/generate", {"input_ids": [1], "sampling_params": {"n": 0}}, "'sampling_params.n'"),
        ("/generate", {"input_ids": [1], "sampling_params": {"stop": [1, "several tokens"]}}, "several tokens"),
        ("/generate", {"input_ids": [1], "sampling_params": {"stop": [{}]}}, "stop"),
        ("/generate", {"input_ids": [1], "sampling_params": {"stop": [""]}}, "stop"),
        ("/v1/completions", {"prompt": [1, 2]}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": None}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stream": True}, "stream"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {}}, "logit_bias"),
        ("/v1/chat/completions", {"messages": "hello"}, "messages"),
        ("/v1/chat/completions", {"messages": ["hello"]}, "messages"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
    ],
)
async def test_a_request_that_cannot_be_honoured_is_refused_by_name(served: Served, path: str, body: Any, named: str) -> None:
    status, reply = await served.post(path, body)
    assert status == 400
    assert named in reply["error"]


async def test_a_service_that_is_gone_is_the_services_fault(walker: Path) -> None:
    async with serving(walker, patience_s=4.0) as served, asyncio.timeout(PATIENCE_S):
        await served.stop_service(None, None, None)
        status, reply = await served.post("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 4}})
    assert (status, reply["kind"]) == (502, "engine_failed")


async def test_requests_wait_for_the_model(walker: Path) -> None:
    from tests.train.models import model_of_a_service

    tokenizer = PreTrainedTokenizerFast.from_pretrained(walker)
    server = InferenceServer("walker", tokenizer, lambda: create_chat_renderer(tokenizer, "llama-3"), ServiceOptions())
    async with server.service.listening() as port, aiohttp.ClientSession() as session:
        address = f"http://127.0.0.1:{port}"
        early = asyncio.create_task(
            session.post(f"{address}/generate", json={"input_ids": [1], "sampling_params": {"max_new_tokens": 4}})
        )
        async with session.get(f"{address}/health") as reply:
            assert await reply.json() == {"status": "loading", "model": "walker", "step": 0}
        async with model_of_a_service(walker) as (model, _):
            server.use(model)
            assert (await early).status == 200
