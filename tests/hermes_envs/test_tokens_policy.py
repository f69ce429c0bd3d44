from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from renderers import RenderedTokens
from transformers import PreTrainedTokenizerFast

from hermes_envs.errors import ConfigError, EngineError, InexactRolloutError
from hermes_envs.policies import PolicyOptions, create_policy
from hermes_envs.policies.base import ContextFullError, TokensOptions, Turn
from hermes_envs.policies.token_record import TokenRecord
from hermes_envs.policies.tokens import TokensConversation, TokensPolicy
from hermes_envs.rendering.chat_renderer import ChatRenderer, FamilyRenderer
from hermes_envs.rendering.derived import DerivedRenderer
from tests.engine.engine import Dialect, Engine
from tests.engine.servers import policy_for, servers_at
from tests.engine.speech import says
from tests.engine.tokenizer import make_tokenizer, token_ids
from tests.support.waiting import PATIENCE_S

QUESTION = [{"role": "user", "content": "List the files."}]
BASH = [
    {"type": "function", "function": {"name": "bash", "description": "", "parameters": {"type": "object", "properties": {}}}}
]
CALL = '<tool_call>\n{"name": "bash", "arguments": {}}\n</tool_call>'


def result_for(call_id: str, content: str = "a.py") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": "bash", "content": content}


# --- what a turn says --------------------------------------------------------------------------------------------------


async def test_a_turn_has_its_content_reasoning_and_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    written = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
    text = f"<think>\nFiles?\n</think>\n\nI look.\n{written}<|im_end|>"
    async with Engine(tokenizer, "sglang", says(tokenizer, text)) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=BASH)
        turn = await conversation.respond(QUESTION)

    [call] = turn.tool_calls
    assert (call.name, call.arguments, call.error) == ("bash", {"command": "ls"}, None)
    assert turn.finish_reason == "tool_calls"
    assert turn.message == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Files?",
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": "bash", "arguments": {"command": "ls"}}},
        ],
    }


async def test_call_ids_differ_within_a_turn_and_between_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    call = '<tool_call>\n{"name": "bash", "arguments": {}}\n</tool_call>'
    async with Engine(tokenizer, "vllm", says(tokenizer, f"{call}\n{call}<|im_end|>")) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=BASH)
        first = await conversation.respond(QUESTION)
        second = await conversation.respond([result_for(call.id) for call in first.tool_calls])

    assert len({call.id for call in (*first.tool_calls, *second.tool_calls)}) == 4


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('{"name": "bash", "arguments": {"command": }}', "not valid JSON: Expecting value: line 1 column"),
        ('{"arguments": {}}', "does not name a tool"),
        ('{"name": 7, "arguments": {}}', "does not name a tool"),
        ("[1, 2]", "does not name a tool"),
        ('{"name": "bash", "arguments": "ls -la"}', "arguments are not valid JSON"),
        ('{"name": "bash", "arguments": [1]}', "arguments must be a JSON object, not list"),
        ('{"name": "bash", "arguments": {"command": NaN}}', "arguments are not valid JSON"),
        ('{"name": "bash", "arguments": {"command": "\\ud800"}}', "arguments are not valid JSON"),
    ],
)
async def test_a_malformed_call_stands_with_its_fault_beside_the_good_ones(
    body: str, complaint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    good = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
    text = f"{good}\n<tool_call>\n{body}\n</tool_call>\n{good}<|im_end|>"
    async with Engine(tokenizer, "sglang", says(tokenizer, text)) as engine:
        turn = await policy_for(engine, tokenizer, agent_max_tokens=200).start("t", tools=BASH).respond(QUESTION)

    assert [call.arguments for call in turn.tool_calls] == [{"command": "ls"}, None, {"command": "ls"}]
    broken = turn.tool_calls[1]
    assert broken.error is not None
    assert complaint in broken.error
    assert broken.raw == body
    # The transcript shows what the model wrote, and can be written to a file.
    assert turn.message["tool_calls"][1]["function"]["arguments"] == body
    json.dumps(turn.message, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("body", ["[" * 3000, '{"name": "bash", "arguments": {"n": ' + "9" * 5000 + "}}"])
async def test_what_trips_the_parser_is_a_malformed_call(body: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"<tool_call>\n{body}\n</tool_call><|im_end|>"
    async with Engine(tokenizer, "sglang", says(tokenizer, text)) as engine:
        turn = await policy_for(engine, tokenizer, agent_max_tokens=9000).start("t", tools=BASH).respond(QUESTION)

    [call] = turn.tool_calls
    assert call.error is not None
    assert body in call.raw


async def test_a_later_segment_shows_a_malformed_call_as_it_was_written(tokenizer: PreTrainedTokenizerFast) -> None:
    written = 'So.\n<tool_call>\n{"name": "bash", \n</tool_call>'
    async with Engine(tokenizer, "sglang", says(tokenizer, f"{written}<|im_end|>")) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=BASH)
        await conversation.respond(QUESTION)
        await conversation.respond([{"role": "user", "content": "Try again."}])

    assert len(conversation.record.segments) == 2
    second_prompt = tokenizer.decode(engine.exchanges[1].prompt_ids)
    assert f"<|im_start|>assistant\n{written}<|im_end|>\n<|im_start|>user\nTry again.<|im_end|>" in second_prompt


async def test_a_turn_may_say_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    async with Engine(tokenizer, "tinker", says(tokenizer, "<|im_end|>")) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=BASH)
        turn = await conversation.respond(QUESTION)

    assert (turn.message["content"], turn.tool_calls, turn.finish_reason) == ("", (), "stop")
    assert conversation.record.segments[0].sampled == 1


# --- where a turn ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["sglang", "vllm", "tinker"])
async def test_a_cut_turn_is_known_by_its_tokens_and_its_call_as_unclosed(
    dialect: Dialect, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = '<tool_call>\n{"name": "bash", "arguments": {"command": "' + "ls " * 100
    async with Engine(tokenizer, dialect, says(tokenizer, text)) as engine:
        conversation = policy_for(engine, tokenizer, agent_max_tokens=40).start("t", tools=BASH)
        turn = await conversation.respond(QUESTION)
        await conversation.respond([result_for(turn.tool_calls[0].id, "not closed")])

    assert turn.finish_reason == "length"
    assert turn.tool_calls[0].error == "the tool call was not closed before the answer ended"
    [segment] = conversation.record.segments
    assert segment.sampled == 80
    # The end of the turn that the model did not come to say stands in the record as context.
    cut = engine.exchanges[1].prompt_ids[len(engine.exchanges[0].prompt_ids) + 40 :]
    assert str(tokenizer.decode(cut)).startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\nnot closed\n")


@pytest.mark.parametrize("dialect", ["sglang", "vllm", "tinker"])
async def test_a_turn_that_ends_with_the_last_token_allowed_is_not_cut(
    dialect: Dialect, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "The tests pass.<|im_end|>"
    limit = len(tokenizer.encode(text, add_special_tokens=False))
    async with Engine(tokenizer, dialect, says(tokenizer, text)) as engine:
        turn = await policy_for(engine, tokenizer, agent_max_tokens=limit).start("t", tools=[]).respond(QUESTION)

    assert (turn.finish_reason, turn.message["content"]) == ("stop", "The tests pass.")


async def test_what_is_asked_of_each_engine(tokenizer: PreTrainedTokenizerFast) -> None:
    stops = token_ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    requests: dict[Dialect, dict[str, Any]] = {}
    dialects: list[Dialect] = ["sglang", "vllm"]
    for dialect in dialects:
        async with Engine(tokenizer, dialect, says(tokenizer, "ok<|im_end|>")) as engine:
            await (
                policy_for(engine, tokenizer, agent_max_tokens=33, agent_temperature=0.9).start("t", tools=[]).respond(QUESTION)
            )
        [requests[dialect]] = engine.requests

    common = {"n": 1, "temperature": 0.9, "stop_token_ids": stops}
    assert requests["sglang"]["sampling_params"] == common | {"max_new_tokens": 33, "stop": ["<|im_end|>", "<|endoftext|>"]}
    assert requests["vllm"] == common | {
        "prompt": {"prompt_token_ids": list(engine.exchanges[0].prompt_ids)},
        "logprobs": 0,
        "max_tokens": 33,
    }


async def talk(conversation: TokensConversation, outputs: Sequence[str]) -> None:
    new: list[dict[str, Any]] = [{"role": "system", "content": "You are careful."}, *QUESTION]
    for output in outputs:
        turn = await conversation.respond(new)
        new = [result_for(turn.tool_calls[0].id, output)]


async def go_on(conversation: TokensConversation, turn: Turn) -> None:
    while True:
        turn = await conversation.respond([result_for(turn.tool_calls[0].id)])


@pytest.mark.parametrize("agent_max_tokens", [None, 80])
async def test_a_full_context_is_cut_into_a_new_segment(
    agent_max_tokens: int | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    context, outputs = 900, [f"{number}:" + "file " * 30 for number in range(24)]
    async with Engine(tokenizer, "sglang", says(tokenizer, f"{CALL}<|im_end|>")) as engine:
        policy = policy_for(engine, tokenizer, agent_max_tokens=agent_max_tokens, max_context_tokens=context)
        conversation = policy.start("t", tools=BASH)
        await talk(conversation, outputs)

    for exchange, request in zip(engine.exchanges, engine.requests, strict=True):
        room = request["sampling_params"]["max_new_tokens"]
        assert room == agent_max_tokens or len(exchange.prompt_ids) + room == context
        assert room >= (agent_max_tokens or context / 4), "a turn has the room that it may want"
    segments = conversation.record.segments
    assert len(segments) > 2
    assert sum(segment.sampled for segment in segments) == sum(len(exchange.output_ids) for exchange in engine.exchanges)
    # A segment is everything that the engine saw and said in its last turn: history only grew in between.
    whole = [exchange.prompt_ids + exchange.output_ids for exchange in engine.exchanges]
    ends = [*(place - 1 for place in range(1, len(whole)) if whole[place][: len(whole[place - 1])] != whole[place - 1]), -1]
    assert [tuple(segment.tokens) for segment in segments] == [whole[place] for place in ends]
    for segment in segments[1:]:
        shown = tokenizer.decode(segment.tokens)
        assert "You are careful." in shown
        assert "<|im_start|>user\nList the files.<|im_end|>" in shown
    assert f"<tool_response>\n{outputs[-2]}\n</tool_response>" in shown
    assert f"<tool_response>\n{outputs[0]}\n</tool_response>" not in shown
    conversation.record.check()


async def test_a_prompt_that_cannot_be_shortened_gets_the_room_that_is_left_until_there_is_none(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    question = [{"role": "user", "content": "file " * 150}]
    async with Engine(tokenizer, "sglang", says(tokenizer, f"{CALL}<|im_end|>")) as engine:
        policy = policy_for(engine, tokenizer, agent_max_tokens=None, max_context_tokens=600)
        conversation = policy.start("t", tools=BASH)
        turn = await conversation.respond(question)
        prompt = len(engine.exchanges[0].prompt_ids)
        assert 600 - prompt < 600 / 4
        assert engine.requests[0]["sampling_params"]["max_new_tokens"] == 600 - prompt
        with pytest.raises(ContextFullError, match=r"the prompt has \d+ tokens of 600"):
            await go_on(conversation, turn)
        assert len(engine.exchanges) > 1
    assert all(len(segment.tokens) <= 600 for segment in conversation.record.segments)


async def test_a_trainer_s_limit_counts_where_it_is_lower(tokenizer: PreTrainedTokenizerFast) -> None:
    for own, expected in ((None, 700), (600, 600), (5000, 700)):
        async with Engine(tokenizer, "sglang", says(tokenizer, f"{CALL}<|im_end|>")) as engine:
            policy = policy_for(engine, tokenizer, agent_max_tokens=60, max_context_tokens=own)
            policy.limit_sequences(700)
            conversation = policy.start("t", tools=BASH)
            await talk(conversation, ["file " * 30] * 12)
        longest = max(len(segment.tokens) for segment in conversation.record.segments)
        assert expected / 2 < longest <= expected


class Forgetful:
    """A renderer whose bridge is spoiled; everything else is another's."""

    def __init__(self, renderer: FamilyRenderer, spoil: Callable[[list[int]], list[int]]) -> None:
        self._renderer = renderer
        self._spoil = spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    def bridge_to_next_turn(self, *given: Any, **options: Any) -> RenderedTokens:
        bridged = self._renderer.bridge_to_next_turn(*given, **options)
        assert bridged is not None
        return RenderedTokens(token_ids=self._spoil(list(bridged.token_ids)), message_indices=[])


@pytest.mark.parametrize(
    "spoil",
    [lambda ids: ids[:1], lambda ids: [ids[0] + 1, *ids[1:]], lambda ids: [ids[1], ids[0], *ids[2:]], lambda ids: []],
)
def test_a_bridge_that_rewrites_history_is_refused(
    spoil: Callable[[list[int]], list[int]], tokenizer: PreTrainedTokenizerFast
) -> None:
    sound = DerivedRenderer(tokenizer)
    prompt = ChatRenderer("sound", tokenizer, sound).prompt(QUESTION, BASH)
    answer = [*tokenizer.encode(CALL, add_special_tokens=False), sound.get_stop_token_ids()[0]]

    with pytest.raises(InexactRolloutError, match="renderer 'forgetful' does not begin with the turns before it"):
        ChatRenderer("forgetful", tokenizer, Forgetful(sound, spoil)).next_prompt(prompt, answer, [result_for("c")], BASH)


# --- when something goes wrong ---------------------------------------------------------------------------------------


async def test_a_failed_turn_can_be_tried_again(tokenizer: PreTrainedTokenizerFast) -> None:
    call = '<tool_call>\n{"name": "bash", "arguments": {}}\n</tool_call><|im_end|>'
    spoil: list[Callable[[dict[str, Any]], object]] = [lambda reply: reply, lambda reply: {}, lambda reply: reply]
    async with Engine(tokenizer, "sglang", says(tokenizer, call), lambda reply: spoil.pop(0)(reply)) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=BASH)
        first = await conversation.respond(QUESTION)
        with pytest.raises(EngineError):
            await conversation.respond([result_for(first.tool_calls[0].id)])
        await conversation.respond([result_for(first.tool_calls[0].id)])

    assert engine.exchanges[1].prompt_ids == engine.exchanges[2].prompt_ids
    [segment] = conversation.record.segments
    assert segment.tokens == [*engine.exchanges[2].prompt_ids, *engine.exchanges[2].output_ids]
    assert conversation.record.engine_calls == 2


async def test_cancelling_a_turn_cancels_its_request(tokenizer: PreTrainedTokenizerFast) -> None:
    async with Engine(tokenizer, "sglang", says(tokenizer, "ok<|im_end|>"), delay_s=30.0) as engine:
        conversation = policy_for(engine, tokenizer).start("t", tools=[])
        turn = asyncio.create_task(conversation.respond(QUESTION))
        await asyncio.wait_for(engine.asked.wait(), PATIENCE_S)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        await asyncio.wait_for(engine.aborted.wait(), PATIENCE_S)

    assert conversation.record == TokenRecord("t")


# --- options -----------------------------------------------------------------------------------------------------------


async def test_the_factory_makes_it_from_a_config(tokenizer: PreTrainedTokenizerFast) -> None:
    async with Engine(tokenizer, "vllm", says(tokenizer, "ok<|im_end|>")) as engine:
        options = PolicyOptions(policy="tokens", max_context_tokens=500)
        policy = create_policy(options, servers_at(engine.base_url, server_type="vllm"), tokenizer)
        async with aclosing(policy):
            turn = await policy.start("t", tools=[]).respond(QUESTION)

    assert policy.exact
    assert policy.endpoints.models == ["tiny"]
    assert turn.message["content"] == "ok"


def test_options_that_cannot_work_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sglang = servers_at("http://127.0.0.1:1/v1", server_type="sglang")
    chat = servers_at("http://127.0.0.1:1/v1", server_type="openai")
    other = make_tokenizer(tmp_path)
    other.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    limited = {"agent_max_tokens": 20}

    with pytest.raises(ConfigError, match=r"openai\.server_type: .* sglang or vllm, not openai"):
        TokensPolicy(chat, tokenizer, TokensOptions(**limited))
    with pytest.raises(ConfigError, match=r"agent_max_tokens: .* max_context_tokens"):
        TokensPolicy(sglang, tokenizer, TokensOptions())
    with pytest.raises(ConfigError, match=r"renderer: 'qwen' is unknown; use auto or one of qwen3, "):
        TokensPolicy(sglang, tokenizer, TokensOptions(renderer="qwen", **limited))
    with pytest.raises(ConfigError, match=r"renderer: 'llama-3' does not suit the tokenizer .*begin_of_text"):
        TokensPolicy(sglang, tokenizer, TokensOptions(renderer="llama-3", **limited))
    with pytest.raises(ConfigError, match=r"renderer: .* does not end an assistant's turn with a special token"):
        TokensPolicy(sglang, other, TokensOptions(**limited))


def test_the_renderer_is_found_by_name_or_by_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    servers = servers_at("http://127.0.0.1:1/v1", server_type="sglang")
    options = TokensOptions(agent_max_tokens=20)
    published = make_tokenizer(tmp_path)
    published.chat_template = None
    published.name_or_path = "Qwen/Qwen3-8B"

    assert TokensPolicy(servers, tokenizer, options).renderer.name == "qwen3"
    assert TokensPolicy(servers, published, options).renderer.name == "qwen3"
