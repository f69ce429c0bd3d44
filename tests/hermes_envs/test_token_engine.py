"""Engines that cannot be trusted: nothing that they say becomes training data unless it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from hermes_envs.errors import EngineError
from hermes_envs.policies.base import TokensOptions
from hermes_envs.policies.endpoints import Endpoints
from hermes_envs.policies.token_endpoint import TokenEndpoint
from hermes_envs.policies.token_engine import TokenEngine
from hermes_envs.policies.token_record import TokenRecord
from hermes_envs.policies.tokens import TokensPolicy
from hermes_envs.rendering.choice import create_chat_renderer
from tests.engine.engine import Dialect, Engine
from tests.engine.servers import policy_for, servers_at
from tests.engine.speech import says
from tests.engine.tokenizer import make_tokenizer
from tests.support.waiting import PATIENCE_S

QUESTION = [{"role": "user", "content": "List the files."}]
BASH = [
    {"type": "function", "function": {"name": "bash", "description": "", "parameters": {"type": "object", "properties": {}}}}
]


def result_for(call_id: str, content: str = "a.py") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": "bash", "content": content}


def entries(reply: dict[str, Any]) -> list[list[Any]]:
    found: list[list[Any]] = reply["meta_info"]["output_token_logprobs"]
    return found


def without_end(reply: dict[str, Any]) -> dict[str, Any]:
    entries(reply).pop()
    return with_meta(completion_tokens=len(entries(reply)))(reply)


def with_end_inside(reply: dict[str, Any]) -> dict[str, Any]:
    entries(reply)[1] = entries(reply)[-1]
    return reply


def with_entry(place: int, value: list[Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def mangle(reply: dict[str, Any]) -> dict[str, Any]:
        entries(reply)[place] = value
        return reply

    return mangle


def with_meta(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda reply: reply | {"meta_info": reply["meta_info"] | changes}


@pytest.mark.parametrize(
    ("mangle", "complaint"),
    [
        (with_meta(output_token_logprobs=[], completion_tokens=0), "returned no token"),
        (lambda reply: {"text": reply["text"]}, "returned no token"),
        (lambda reply: [], "returned 0 completions"),
        (lambda reply: [reply, reply], "returned 2 completions"),
        (with_entry(1, [-1.0, 10**6, None]), "returned 1000000 as a token"),
        (with_entry(1, [-1.0, -5, None]), "returned -5 as a token"),
        (with_entry(1, [-1.0, None, None]), "returned None as a token"),
        (with_entry(1, [-1.0, "17", None]), "returned '17' as a token"),
        (with_entry(1, [None, 17, None]), "returned None as a logprob"),
        (with_entry(1, [0.7, 17, None]), r"returned 0\.7 as a logprob"),
        (with_end_inside, "went on after a stop token"),
        (without_end, r"ended a turn at '\.', which is no stop token"),
        (with_meta(finish_reason={"type": "abort"}), "aborted"),
        (
            lambda reply: with_meta(output_token_logprobs=entries(reply)[:2] * 40, completion_tokens=80)(reply),
            "80 tokens where at most 60",
        ),
    ],
)
async def test_an_answer_that_cannot_be_training_data_is_refused(
    mangle: Callable[[dict[str, Any]], object], complaint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with Engine(tokenizer, "sglang", says(tokenizer, "The tests pass.<|im_end|>"), mangle) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=[])
        with pytest.raises(EngineError, match=complaint):
            await conversation.respond(QUESTION)

    assert conversation.record == TokenRecord("t")


async def test_vllm_without_logprobs_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    spoiled: list[Callable[[dict[str, Any]], object]] = [
        lambda reply: {key: value for key, value in reply.items() if key != "logprobs"},
        lambda reply: reply | {"logprobs": [], "finish_reasons": []},
        lambda reply: reply | {"logprobs": [[[{}]]]},
    ]

    async def error_of(mangle: Callable[[dict[str, Any]], object]) -> str:
        async with Engine(tokenizer, "vllm", says(tokenizer, "ok<|im_end|>"), mangle) as engine:
            with pytest.raises(EngineError) as caught:
                await policy_for(engine, tokenizer).start("t", tools=[]).respond(QUESTION)
        return str(caught.value)

    missing, none, empty = await asyncio.gather(*map(error_of, spoiled))

    assert missing.endswith("has not the form of vllm: KeyError: 'logprobs'")
    assert none == "the engine returned 0 completions where one was asked for"
    assert empty == "the engine returned a token without a logprob"


async def test_an_engine_that_fails_is_named_with_the_cause(tokenizer: PreTrainedTokenizerFast) -> None:
    async def error_of(engine: Engine) -> str:
        async with engine:
            with pytest.raises(EngineError) as caught:
                await policy_for(engine, tokenizer, timeout_s=1).start("t", tools=[]).respond(QUESTION)
        assert engine.base_url in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    class Refusing(Engine):
        """Gives its address and is gone."""

        async def __aenter__(self) -> Refusing:
            await super().__aenter__()
            await self.stop()
            return self

    def reply(**response: Any) -> Callable[[dict[str, Any]], object]:
        return lambda _: web.Response(**response)

    page = reply(text="<html>Bad gateway</html>", content_type="text/html")
    refused, slow, html, garbage, broken = await asyncio.gather(
        error_of(Refusing(tokenizer, "sglang")),
        error_of(Engine(tokenizer, "sglang", delay_s=2.0)),
        error_of(Engine(tokenizer, "sglang", mangle=page)),
        error_of(Engine(tokenizer, "vllm", mangle=reply(text='{"logprobs": [[', content_type="application/json"))),
        error_of(Engine(tokenizer, "tinker", mangle=reply(text="out of memory", status=500))),
    )

    assert "ClientConnectorError: Cannot connect" in refused
    assert "did not answer within 1 s" in slow
    assert "did not answer with JSON: '<html>Bad gateway" in html
    assert "did not answer with JSON: '{\"logprobs\": [['" in garbage
    assert "refused: 500 Internal Server Error: out of memory" in broken


@pytest.mark.parametrize(
    ("dialect", "mangle", "complaint"),
    [
        ("sglang", with_meta(prompt_tokens=5), r"a prompt of 5 tokens where \d+ were sent"),
        ("tinker", with_meta(prompt_tokens=5), r"a prompt of 5 tokens where \d+ were sent"),
        ("sglang", with_meta(completion_tokens=40), r"sampled 40 tokens and returned \d+ with their logprobs"),
        ("sglang", lambda reply: reply | {"output_ids": [1, 2, 3]}, "sampled 3 tokens and returned others"),
        ("sglang", lambda reply: ["no"], "the engine's answer is no object but no"),
        ("vllm", lambda reply: reply | {"prompt_token_ids": [1, 2, 3]}, "another prompt, of 3 tokens"),
        # Cut at the limit this would pass for a shorter turn.
        (
            "vllm",
            lambda reply: reply | {"logprobs": [reply["logprobs"][0][:2]], "finish_reasons": ["length"]},
            r"sampled \d+ tokens and returned others, 2, with logprobs",
        ),
    ],
)
async def test_what_an_engine_says_of_its_answer_must_agree_with_it(
    dialect: Dialect,
    mangle: Callable[[dict[str, Any]], object],
    complaint: str,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    async with Engine(tokenizer, dialect, says(tokenizer, "The tests pass.<|im_end|>"), mangle) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=[])
        with pytest.raises(EngineError, match=complaint):
            await conversation.respond(QUESTION)

    assert conversation.record == TokenRecord("t")


async def test_a_repeated_token_at_the_beginning_reaches_the_engine(tmp_path: Path) -> None:
    """atroposlib's own request would take away the second of two beginning-of-sequence tokens without a word."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    renderer = create_chat_renderer(tokenizer)
    prompt = [tokenizer.bos_token_id, *renderer.prompt(QUESTION, [])]
    assert prompt[0] == prompt[1]
    async with (
        Engine(tokenizer, "sglang", says(tokenizer, "ok<|im_end|>")) as engine,
        aclosing(Endpoints(map(TokenEndpoint, servers_at(engine.base_url, server_type="sglang")))) as endpoints,
    ):
        await TokenEngine(endpoints, renderer, temperature=1.0).sample(prompt, 20)
    assert list(engine.exchanges[0].prompt_ids) == prompt


async def test_patience_with_engines_that_are_down_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    async with Engine(tokenizer, "sglang", says(tokenizer, "ok<|im_end|>")) as engine:
        servers = servers_at(engine.base_url, server_type="sglang", health_check=True)
        policy = TokensPolicy(servers, tokenizer, TokensOptions(agent_max_tokens=20), engine_patience_s=1.5)
        async with aclosing(policy):
            await policy.start("first", tools=[]).respond(QUESTION)
            await engine.stop()
            started = time.monotonic()
            with pytest.raises(EngineError, match=r"the endpoint http://127.* failed: ClientConnectorError"):
                async with asyncio.timeout(PATIENCE_S):
                    await policy.start("second", tools=[]).respond(QUESTION)

    assert time.monotonic() - started >= 1.5
