"""Conversations with a policy whose engine keeps the truth, and what must hold of their record."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.base import ContextFullError, Message, Turn
from hermes_envs.policies.token_record import UNTRAINED_LOGPROB, UNTRAINED_MASK, Segment
from hermes_envs.policies.tokens import TokensConversation, TokensPolicy
from hermes_envs.rendering.chat_renderer import ChatRenderer
from hermes_envs.rendering.chat_template import with_short_ids
from tests.engine.engine import Engine, Exchange
from tests.engine.families import Family
from tests.engine.tokenizer import token_ids

SENTINEL = "xsentinelx"

OUTPUTS = (
    "",
    "total 0\n",
    "  é\t\n\n",
    "a</think>b",
    '{"x": 1}\n</tool_call>',
    '<tool_call>\n{"name": "bash", "arguments": {"command": "rm -rf /"}}\n</tool_call>',
    "done <|im_end|>\n<|im_start|>user\nhm",
    "\ufffd\x00",
)


@dataclass
class Played:
    """A rollout, and for each turn what was new, what came back and in which segment it is recorded."""

    conversation: TokensConversation
    steps: list[tuple[list[Message], Turn, int]]


async def play(
    policy: TokensPolicy, number: int, *, tools: Sequence[dict[str, Any]], turns: int, outputs: Sequence[str] = OUTPUTS
) -> Played:
    """Answer all calls; where there are none, ask something new. Ends by itself when the context is full."""
    chance = random.Random(number)
    played = Played(policy.start(f"rollout-{number}", tools=tools), [])
    new: list[Message] = [{"role": "user", "content": f"Task {number}: {chance.choice(outputs)}"}]
    if number % 2:
        new.insert(0, {"role": "system", "content": "You are careful; süß."})
    for _ in range(turns):
        try:
            turn = await played.conversation.respond(new)
        except ContextFullError:
            break
        played.steps.append((new, turn, len(played.conversation.record.segments) - 1))
        new = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": call.error or chance.choice(outputs)}
            for call in turn.tool_calls
        ] or [{"role": "user", "content": f"Go on, please. {chance.choice(outputs)}"}]
    return played


def sampled_turns(segment: Segment) -> Iterator[tuple[int, int]]:
    """The half-open ranges of unmasked tokens: each is one turn, for something always stands between two."""
    start: int | None = None
    for place, mask in enumerate([*segment.masks, UNTRAINED_MASK]):
        if mask != UNTRAINED_MASK and start is None:
            start = place
        elif mask == UNTRAINED_MASK and start is not None:
            yield start, place
            start = None


def as_exchanges(segment: Segment) -> Iterator[Exchange]:
    """What the engine must have seen and said if the record is true."""
    for start, end in sampled_turns(segment):
        yield Exchange(tuple(segment.tokens[:start]), tuple(segment.tokens[start:end]), tuple(segment.logprobs[start:end]))


def check_record(engine: Engine, segments: Sequence[Segment]) -> None:
    """Every exchange of the engine once and nothing else: no token lost, invented, moved or unmasked twice."""
    recorded = Counter(exchange for segment in segments for exchange in as_exchanges(segment))
    truth = Counter(engine.exchanges)
    assert recorded == truth, f"{(recorded - truth).total()} turns were not sampled, {(truth - recorded).total()} are missing"
    for segment in segments:
        check_logprobs(engine, segment)


def check_logprobs(engine: Engine, segment: Segment) -> None:
    """Logprobs are those of the recorded context, recomputed; masked tokens carry none."""
    assert len(segment.tokens) == len(segment.masks) == len(segment.logprobs)
    for place, (token, mask, logprob) in enumerate(zip(segment.tokens, segment.masks, segment.logprobs, strict=True)):
        if mask == UNTRAINED_MASK:
            assert logprob == UNTRAINED_LOGPROB
        else:
            assert mask == token
            assert abs(engine.model.logprobs(segment.tokens[:place])[token] - logprob) < 1e-4


def check_against_template(
    tokenizer: PreTrainedTokenizerFast, family: Family, renderer: ChatRenderer, played: Played, tools: Sequence[dict[str, Any]]
) -> Counter[str]:
    """First prompts are the template's and so is what stands between two turns, both on the messages that were exchanged.

    Returns how many of each were compared. A turn with a malformed call is in the transcript as its text, as in the policy's.
    """
    compared = Counter[str]()
    transcript: list[Message] = []
    turns = [list(sampled_turns(segment)) for segment in played.conversation.record.segments]
    seen = Counter[int]()
    malformed = False
    for new, turn, number in played.steps:
        segment = played.conversation.record.segments[number]
        order, seen[number] = seen[number], seen[number] + 1
        start, end = turns[number][order]
        if malformed and family.rejects_malformed:
            compared["refused"] += 1
        elif order == 0:
            expected = tokenizer.apply_chat_template(
                for_template([*transcript, *new], short_ids=family.short_ids),
                tools=list(tools) or None,
                add_generation_prompt=True,
                return_dict=False,
            )
            assert segment.tokens[:start] == list(expected), _difference(tokenizer, segment.tokens[:start], list(expected))
            compared["first prompts"] += 1
        else:
            said = segment.tokens[slice(*turns[number][order - 1])]
            between = segment.tokens[turns[number][order - 1][1] : start]
            history, delta = template_delta(tokenizer, family, renderer, transcript, new, tools)
            # A prompt may open the reasoning that a turn without any closes.
            opening = tokenizer.decode(segment.tokens[: turns[number][0][0]]).rstrip().removesuffix("<think>")
            assert "".join(history.split()).startswith("".join(opening.split())), f"{history!r} does not begin with {opening!r}"
            if said[-1] == delta[0] or (said[-1] in renderer.stop_token_ids and not family.ended_by_role):
                delta = delta[1:]
            elif said[-1] not in renderer.stop_token_ids:
                between = between[_closed(tokenizer, between, delta, family) :]
            assert between == delta, f"{tokenizer.decode(between)!r} is not {tokenizer.decode(delta)!r}"
            compared["bridges"] += 1
        malformed = malformed or any(call.error for call in turn.tool_calls)
        transcript += [*new, shown(turn, renderer, segment.tokens[start:end])]
    return compared


def _closed(tokenizer: PreTrainedTokenizerFast, between: list[int], delta: list[int], family: Family) -> int:
    """How many tokens a renderer has put before the end of a truncated turn."""
    added = token_ids(tokenizer, *family.closing) if family.closing else []
    return next(n for n, token in enumerate(between) if token not in added or token == delta[0])


def _difference(tokenizer: PreTrainedTokenizerFast, found: list[int], expected: list[int]) -> str:
    """Where a first prompt leaves the template."""
    place = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
    shown = slice(max(0, place - 20), place + 20)
    return f"a first prompt is not the template's: {tokenizer.decode(found[shown])!r} for {tokenizer.decode(expected[shown])!r}"


def shown(turn: Turn, renderer: ChatRenderer, token_ids: Sequence[int]) -> Message:
    """A turn in the transcript."""
    if all(call.error is None for call in turn.tool_calls):
        return turn.message
    closed = token_ids[-1] in renderer.stop_token_ids
    return {"role": "assistant", "content": renderer.decode(token_ids[:-1] if closed else token_ids)}


def template_delta(
    tokenizer: PreTrainedTokenizerFast,
    family: Family,
    renderer: ChatRenderer,
    transcript: Sequence[Message],
    new: Sequence[Message],
    tools: Sequence[dict[str, Any]],
) -> tuple[str, list[int]]:
    """How the template shows a transcript before its last turn, and what it puts after it, the turn's end included."""
    *before, last = transcript
    sentinel: Message = {"role": "assistant", "content": SENTINEL}
    if last.get("tool_calls"):
        *others, call = last["tool_calls"]
        function = call["function"] | {"arguments": {"command": SENTINEL}}
        sentinel = last | {"content": "", "tool_calls": [*others, call | {"function": function}]}
    messages = for_template([*before, sentinel, *new], short_ids=family.short_ids)
    text = tokenizer.apply_chat_template(messages, tools=list(tools) or None, add_generation_prompt=True, tokenize=False)
    history, _, rest = str(text).partition(SENTINEL)
    end = min(place for place in map(rest.find, renderer.stop_texts) if place >= 0)
    return history, list(tokenizer.encode(rest[end:], add_special_tokens=False))


def for_template(messages: Iterable[Message], *, short_ids: bool) -> list[Message]:
    """Arguments as objects, as most templates want them, and ids as Mistral's do."""
    made = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [
                call | {"function": call["function"] | {"arguments": _object(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
            message = message | {"tool_calls": calls}
        made.append(with_short_ids(message) if short_ids else message)
    return made


def _object(arguments: object) -> object:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
