"""What is recorded is what the engine saw and produced: hundreds of turns of tool-calling rollouts against an engine that keeps
the truth, in all its dialects."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.base import Message
from hermes_envs.policies.token_record import UNTRAINED_LOGPROB, UNTRAINED_MASK, Segment
from tests.engine.conversations import Played, as_exchanges, play, sampled_turns
from tests.engine.engine import Dialect, Engine
from tests.engine.servers import policy_for
from tests.engine.speech import Speech
from tests.engine.tokenizer import token_ids
from tests.engine.turns import TOOLS

ROLLOUTS, TURNS = 18, 10


@pytest.mark.parametrize("dialect", ["sglang", "vllm", "tinker"])
async def test_the_record_is_what_the_engine_saw_and_produced(dialect: Dialect, tokenizer: PreTrainedTokenizerFast) -> None:
    speech = Speech(tokenizer, seed=11)
    async with Engine(tokenizer, dialect, speech) as engine:
        policy = policy_for(engine, tokenizer, agent_max_tokens=120, max_context_tokens=6000)
        rollouts = await asyncio.gather(*(play(policy, number, tools=TOOLS, turns=TURNS) for number in range(ROLLOUTS)))

    segments = [segment for played in rollouts for segment in played.conversation.record.segments]
    calls = sum(played.conversation.record.engine_calls for played in rollouts)
    assert calls == len(engine.exchanges) == ROLLOUTS * TURNS >= 170
    assert len(set(speech.kinds)) == 16
    # Every exchange once and nothing else: no token lost, invented, moved or unmasked twice.
    assert Counter(exchange for segment in segments for exchange in as_exchanges(segment)) == Counter(engine.exchanges)
    for segment in segments:
        check_logprobs_by_recomputation(engine, segment)
    for played in rollouts:
        check_segments(played)
        check_text_between_turns(tokenizer, played)
        check_first_prompts(tokenizer, played)
    assert sum(len(list(sampled_turns(segment))) - 1 for segment in segments) > 100, "hardly a turn continues another"
    assert {turn.finish_reason for played in rollouts for _, turn, _ in played.steps} == {"stop", "tool_calls", "length"}
    assert any(call.error for played in rollouts for _, turn, _ in played.steps for call in turn.tool_calls)


def check_logprobs_by_recomputation(engine: Engine, segment: Segment) -> None:
    for place, (token, mask, logprob) in enumerate(zip(segment.tokens, segment.masks, segment.logprobs, strict=True)):
        if mask == UNTRAINED_MASK:
            assert logprob == UNTRAINED_LOGPROB
        else:
            assert abs(engine.model.logprobs(segment.tokens[:place])[token] - logprob) < 1e-4


def check_segments(played: Played) -> None:
    """Tool results continue a segment. A new question opens one: Qwen3's template drops the reasoning before it."""
    numbers = [-1, *(number for _, _, number in played.steps)]
    for (new_messages, _, number), before in zip(played.steps, numbers, strict=False):
        assert number == before + (new_messages[-1]["role"] == "user")


def check_text_between_turns(tokenizer: PreTrainedTokenizerFast, played: Played) -> None:
    """Between two turns stands what the chat template itself puts there: it renders a sentinel in place of the answer."""
    stops = token_ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    turn_numbers = Counter[int]()
    for new_messages, _, number in played.steps:
        segment = played.conversation.record.segments[number]
        turns = list(sampled_turns(segment))
        turn_number, turn_numbers[number] = turn_numbers[number], turn_numbers[number] + 1
        if turn_number == 0:
            continue
        (start, stop), (next_start, _) = turns[turn_number - 1 : turn_number + 1]
        said, between = segment.tokens[start:stop], segment.tokens[stop:next_start]
        expected = between_turns(tokenizer, new_messages)
        if said[-1] in stops:
            expected = expected.removeprefix("<|im_end|>")
        assert tokenizer.decode(between) == expected
        assert between == tokenizer.encode(expected, add_special_tokens=False)


def between_turns(tokenizer: PreTrainedTokenizerFast, new_messages: Sequence[Message]) -> str:
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "SENTINEL"}]
    text = tokenizer.apply_chat_template([*before, *new_messages], tokenize=False, add_generation_prompt=True)
    return str(text).partition("SENTINEL")[2]


def check_first_prompts(tokenizer: PreTrainedTokenizerFast, played: Played) -> None:
    """Each segment begins with the chat template's own rendering of all messages, tools included."""
    transcript: list[Message] = []
    seen = -1
    comparable = True
    for new_messages, turn, number in played.steps:
        transcript.extend(new_messages)
        if number > seen and comparable:
            segment = played.conversation.record.segments[number]
            start, _ = next(sampled_turns(segment))
            rendered = tokenizer.apply_chat_template(
                transcript, tools=TOOLS, tokenize=True, add_generation_prompt=True, return_dict=False
            )
            assert segment.tokens[:start] == list(rendered)
        seen = number
        transcript.append(turn.message)
        # A malformed call is rendered as the text that it was, of which the transcript's message has no room.
        comparable = comparable and not any(call.error for call in turn.tool_calls)
    assert seen == len(played.conversation.record.segments) - 1
