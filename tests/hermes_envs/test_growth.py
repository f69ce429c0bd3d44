"""What a turn costs must not grow with the turns before it, or no faster than the conversation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.token_record import Segment, TokenRecord
from hermes_envs.rendering.choice import create_chat_renderer

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "bash", "description": "", "parameters": {"type": "object", "properties": {}}}}
]
CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call><|im_end|>'
RESULT = {"role": "tool", "tool_call_id": "c", "name": "bash", "content": "a.py b.py c.py\n" * 20}


def growth(seconds_of: Callable[[int], float], size: int) -> float:
    """How many times as long four times the size takes. Other work on the machine can only add to it: the least counts."""
    small, large = (min(seconds_of(amount) for _ in range(5)) for amount in (size, 4 * size))
    return large / small


def timed(work: Callable[[], object]) -> float:
    """Seconds of the processor: those of the clock depend on what else is running."""
    started = time.process_time()
    work()
    return time.process_time() - started


def add_turns(segment: Segment, turns: int) -> None:
    context, answer, logprobs = list(range(100, 200)), list(range(20)), [-0.5] * 20
    for _ in range(turns):
        segment.append_turn(context, answer, logprobs)


def record_of(turns: int) -> TokenRecord:
    segment = Segment()
    add_turns(segment, turns)
    return TokenRecord("t", [segment], turns)


def test_a_turn_is_recorded_as_fast_after_many_turns_as_after_few() -> None:
    def seconds_after(turns: int) -> float:
        [segment] = record_of(turns).segments
        return timed(lambda: add_turns(segment, 100))

    assert growth(seconds_after, 300) < 2.5


def test_the_check_at_the_end_is_linear() -> None:
    records = {turns: record_of(turns) for turns in (300, 1200)}
    assert growth(lambda turns: timed(records[turns].check), 300) < 9


@pytest.mark.parametrize("name", ["qwen3", "derived"])
def test_the_next_prompt_takes_time_in_proportion_to_the_conversation(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = create_chat_renderer(tokenizer, name)
    answer = renderer.encode(CALL)

    def play(turns: int) -> tuple[list[int], float]:
        prompt, seconds = renderer.prompt([{"role": "user", "content": "List the files."}], TOOLS), 0.0
        for _ in range(turns):
            started = time.process_time()
            extended = renderer.next_prompt(prompt, answer, [RESULT], TOOLS)
            seconds = time.process_time() - started
            assert extended is not None
            prompt = extended
        return prompt, seconds

    # The last of so many turns.
    assert growth(lambda turns: play(turns)[1], 40) < 9


def test_a_derived_renderer_does_not_read_the_whole_conversation_again(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = create_chat_renderer(tokenizer, "derived")
    answer, result = renderer.encode(CALL), RESULT | {"content": "a.py b.py c.py\n" * 200}
    prompt = renderer.prompt([{"role": "user", "content": "List the files."}], TOOLS)
    seconds = []
    for _ in range(60):
        started = time.process_time()
        extended = renderer.next_prompt(prompt, answer, [result], TOOLS)
        seconds.append(time.process_time() - started)
        assert extended is not None
        prompt = extended

    assert min(seconds[-5:]) < min(timed(lambda: renderer.decode(prompt)) for _ in range(5)) / 2
