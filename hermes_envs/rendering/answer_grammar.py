"""Parsers of answers for models of which only the tokenizer is known.

The parsers are those of the `renderers` library where it has them. Which one applies is seen from how the chat template writes
a call.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from renderers import ParsedResponse, ParsedToolCall, ToolCallParseStatus
from renderers.parsing import (
    parse_glm,
    parse_kimi_k2,
    parse_laguna_xs2,
    parse_llama_3,
    parse_minimax,
    parse_qwen35,
)

REASONING_TAGS = ("<think>", "</think>")
TAGS = (*REASONING_TAGS, "<tool_call>", "</tool_call>")

# Reasoning can only come first, and a call inside of it is not made.
_TRANSITIONS = {
    ("reasoning", "<think>"): "reasoning",
    ("reasoning", "</think>"): "content",
    ("content", "<tool_call>"): "call",
    ("call", "</tool_call>"): "content",
}
_CALL_ENDS_REASONING = _TRANSITIONS | {("reasoning", "<tool_call>"): "call"}


@dataclass(frozen=True)
class _Format:
    """A format of calls: the texts that identify it, its parser, and the special tokens that the parser needs, by argument."""

    marks: tuple[str, ...]
    parser: Callable[..., ParsedResponse]
    tokens: Mapping[str, str]
    typed: bool = False
    """Whether the parser needs the tools' schemas, because arguments are written without quotes."""
    reasons: bool = True
    """Whether the parser knows reasoning."""

    @property
    def call_tokens(self) -> set[str]:
        """The tokens without which a call cannot be told from text. Those of reasoning may be missing."""
        return set(self.tokens.values()) - set(REASONING_TAGS)


_THINK = {"think_id": "<think>", "think_end_id": "</think>"}
_CALL = {"tool_call_id": "<tool_call>", "tool_call_end_id": "</tool_call>"}
_ARGUMENTS = {
    "arg_key_id": "<arg_key>",
    "arg_key_end_id": "</arg_key>",
    "arg_value_id": "<arg_value>",
    "arg_value_end_id": "</arg_value>",
}
_DEEPSEEK = {"call_id": "<｜tool▁call▁begin｜>", "name_end_id": "<｜tool▁sep｜>", "call_end_id": "<｜tool▁call▁end｜>"}
_KIMI = {
    "tool_calls_section_begin_id": "<|tool_calls_section_begin|>",
    "tool_calls_section_end_id": "<|tool_calls_section_end|>",
    "tool_call_begin_id": "<|tool_call_begin|>",
    "tool_call_argument_begin_id": "<|tool_call_argument_begin|>",
    "tool_call_end_id": "<|tool_call_end|>",
}
_MINIMAX = {"tool_call_id": "<minimax:tool_call>", "tool_call_end_id": "</minimax:tool_call>"}


class AnswerGrammar:
    """Parses the answers of one model."""

    def __init__(self, tokenizer: Any, format: _Format | None) -> None:
        self._tokenizer = tokenizer
        self._format = format
        self._added: dict[str, int] = tokenizer.get_added_vocab()

    @classmethod
    def of(cls, tokenizer: Any, rendered_call: str) -> AnswerGrammar:
        """The grammar for a tokenizer whose template writes a call like this."""
        added = set(tokenizer.get_added_vocab())
        fitting = (
            format for format in _FORMATS if format.call_tokens <= added and all(mark in rendered_call for mark in format.marks)
        )
        return cls(tokenizer, next(fitting, None))

    @property
    def reads_calls(self) -> bool:
        """Whether the format of the model's calls is known."""
        return self._format is not None

    def parse(
        self, token_ids: list[int], *, stop_ids: set[int], tools: Sequence[dict[str, Any]] | None, prefilled_thinking: bool
    ) -> ParsedResponse:
        """Parse an answer up to its first stop token."""
        if self._format is None:
            return parse_tagged_json(self._tokenizer, token_ids, stop_ids=stop_ids, prefilled_thinking=prefilled_thinking)
        options: dict[str, Any] = {name: self._added.get(token, -1) for name, token in self._format.tokens.items()}
        if self._format.typed:
            options["tools"] = list(tools or ())
        if self._format.reasons:
            options["prefilled_thinking"] = prefilled_thinking
        return self._format.parser(self._tokenizer, token_ids, stop_ids=stop_ids, **options)


def parse_tagged_json(
    tokenizer: Any, token_ids: Sequence[int], *, stop_ids: set[int], prefilled_thinking: bool = False
) -> ParsedResponse:
    """Hermes' form: `<think>...</think>`, words and `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    A tag that the tokenizer has as a token counts only as that token; any other is found in the text.
    """
    ids = list(itertools.takewhile(lambda token: token not in stop_ids, token_ids))
    pieces = list(_pieces(tokenizer, ids))
    thinking = prefilled_thinking or _opens_with_reasoning(pieces)
    answer = _read(pieces, _TRANSITIONS, thinking)
    if answer.state == "reasoning":
        answer = _read(pieces, _CALL_ENDS_REASONING, thinking)
    return ParsedResponse(
        content=answer.texts["content"].strip(),
        reasoning_content=answer.texts["reasoning"].strip() or None,
        tool_calls=[_json_call(written.strip(), closed) for written, closed in answer.calls],
        reasoning_complete=answer.state != "reasoning",
    )


def _pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """The text in pieces: pairs of a tag and its text, or of an empty string and other text. Takes linear time.

    `renderers.tagged` does the same in a time that grows with the square of the answer's length.
    """
    added = tokenizer.get_added_vocab()
    own = {added[tag]: tag for tag in TAGS if tag in added}
    spelled = re.compile("|".join(re.escape(tag) for tag in TAGS if tag not in added) or "(?!)")
    for tag, run in itertools.groupby(ids, own.get):
        if tag is not None:
            yield from ((tag, tag) for _ in run)
            continue
        text = str(tokenizer.decode(list(run), skip_special_tokens=False))
        words = spelled.split(text)
        yield "", words[0]
        for found, following in zip(spelled.findall(text), words[1:], strict=True):
            yield found, found
            yield "", following


@dataclass
class _Answer:
    """What has been parsed so far. `calls` are the texts of calls, each with whether it was closed."""

    state: str
    texts: dict[str, str]
    calls: list[tuple[str, bool]]


def _read(pieces: Iterable[tuple[str, str]], transitions: Mapping[tuple[str, str], str], thinking: bool) -> _Answer:
    answer = _Answer("reasoning" if thinking else "content", {"reasoning": "", "content": "", "call": ""}, [])
    for tag, text in pieces:
        state = transitions.get((answer.state, tag))
        if state is None:
            answer.texts[answer.state] += text
            continue
        if answer.state == "call":
            answer.calls.append((answer.texts["call"], True))
        answer.texts["call"] = ""
        answer.state = state
    if answer.state == "call":
        answer.calls.append((answer.texts["call"], False))
    return answer


def _opens_with_reasoning(pieces: Iterable[tuple[str, str]]) -> bool:
    first = next((tag for tag, text in pieces if text.strip()), "")
    return first == "<think>"


def _json_call(written: str, closed: bool) -> ParsedToolCall:
    if not closed:
        return ParsedToolCall(written, status=ToolCallParseStatus.UNCLOSED_BLOCK)
    return _call_of_json(written, written)


def _call_of_json(written: str, raw: str) -> ParsedToolCall:
    """A call from `{"name": ..., "arguments": ...}`."""
    try:
        call = json.loads(written)
    # A RecursionError is what thousands of nested brackets give.
    except (ValueError, RecursionError):
        return ParsedToolCall(raw, status=ToolCallParseStatus.INVALID_JSON)
    if not isinstance(call, dict) or not call.get("name"):
        return ParsedToolCall(raw, status=ToolCallParseStatus.MISSING_NAME)
    id = call.get("id") if isinstance(call.get("id"), str) else None
    return ParsedToolCall(raw, name=call["name"], arguments=call.get("arguments", {}), id=id)


def parse_mistral(tokenizer: Any, token_ids: Sequence[int], *, stop_ids: set[int], calls_id: int) -> ParsedResponse:
    """Mistral's forms: `[TOOL_CALLS]` and a JSON list of calls, or for each call `[TOOL_CALLS]name[ARGS]{...}`.

    An id may stand in a call of the list, or as `[CALL_ID]...` after the name.
    """
    ids = list(itertools.takewhile(lambda token: token not in stop_ids, token_ids))
    content, *blocks = _split(ids, calls_id)
    calls: list[ParsedToolCall] = []
    for block in blocks:
        text = str(tokenizer.decode(block, skip_special_tokens=False)).strip()
        named = re.fullmatch(r"(?s)(?P<name>[^\[{]*?)(?:\[CALL_ID\](?P<id>.*?))?\[ARGS\](?P<arguments>.*)", text)
        calls.extend(_listed_calls(text) if named is None else [_named_call(text, **named.groupdict())])
    return ParsedResponse(content=str(tokenizer.decode(content, skip_special_tokens=False)).strip(), tool_calls=calls)


def _split(ids: Sequence[int], mark: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == mark:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _listed_calls(text: str) -> list[ParsedToolCall]:
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        return [ParsedToolCall(text, status=ToolCallParseStatus.INVALID_JSON)]
    if not isinstance(calls, list):
        return [ParsedToolCall(text, status=ToolCallParseStatus.MALFORMED_STRUCTURE)]
    return [_call_of_json(json.dumps(call), json.dumps(call, ensure_ascii=False)) for call in calls]


def _named_call(text: str, name: str, id: str | None, arguments: str) -> ParsedToolCall:
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return ParsedToolCall(arguments, name=name, id=id, status=ToolCallParseStatus.INVALID_JSON)
    return ParsedToolCall(text, name=name.strip(), arguments=parsed, id=id)


def parse_deepseek(
    tokenizer: Any,
    token_ids: Sequence[int],
    *,
    stop_ids: set[int],
    call_id: int,
    name_end_id: int,
    call_end_id: int,
    prefilled_thinking: bool = False,
) -> ParsedResponse:
    """DeepSeek V3.1's form: for each call its name, a separator and the arguments' JSON, all between special tokens."""
    ids = list(itertools.takewhile(lambda token: token not in stop_ids, token_ids))
    words, *blocks = _split(ids, call_id)
    answer = parse_tagged_json(tokenizer, words, stop_ids=stop_ids, prefilled_thinking=prefilled_thinking)
    for block in blocks:
        closed = call_end_id in block
        name, *arguments = _split(list(itertools.takewhile(lambda token: token != call_end_id, block)), name_end_id)
        name_text, *texts = (str(tokenizer.decode(part, skip_special_tokens=False)).strip() for part in (name, *arguments))
        if not closed:
            answer.tool_calls.append(ParsedToolCall("".join(texts), name_text, status=ToolCallParseStatus.UNCLOSED_BLOCK))
        elif len(texts) != 1:
            answer.tool_calls.append(ParsedToolCall(name_text, status=ToolCallParseStatus.MALFORMED_STRUCTURE))
        else:
            answer.tool_calls.append(_named_call(texts[0], name_text, None, texts[0]))
    answer.content = answer.content.removesuffix("<｜tool▁calls▁begin｜>").strip()
    return answer


def parse_llama(tokenizer: Any, token_ids: Sequence[int], *, stop_ids: set[int]) -> ParsedResponse:
    """Llama 3's form: the answer is one JSON object with `name` and `parameters`, with `<|python_tag|>` before it or not."""
    tag = tokenizer.get_added_vocab().get("<|python_tag|>")
    ids = list(token_ids)
    return parse_llama_3(tokenizer, ids[1:] if ids and ids[0] == tag else ids, stop_ids=stop_ids)


_FORMATS = (
    _Format(("<arg_key>",), parse_glm, _THINK | _CALL | _ARGUMENTS, typed=True),
    _Format(("<arg_key>",), parse_laguna_xs2, _THINK | _CALL, typed=True),
    _Format(("<minimax:tool_call>",), parse_minimax, _THINK | _MINIMAX, typed=True),
    _Format(("<tool_call>", "<function="), parse_qwen35, _THINK | _CALL, typed=True),
    _Format(("<｜tool▁calls▁begin｜>",), parse_deepseek, _DEEPSEEK),
    _Format(("<|tool_calls_section_begin|>",), parse_kimi_k2, _KIMI),
    _Format(("[TOOL_CALLS]",), parse_mistral, {"calls_id": "[TOOL_CALLS]"}, reasons=False),
    _Format(("<tool_call>", '"arguments"'), parse_tagged_json, {}),
    _Format(('"name"', '"parameters"'), parse_llama, {}, reasons=False),
)
"""In the order in which they are tried: the marks of one may occur in another, too."""
