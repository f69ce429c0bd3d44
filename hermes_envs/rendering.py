"""Messages to tokens and back: the one place that knows the `renderers` library.

`renderers` has a hand-written renderer for each model family, which renders the first prompt, reads an answer from its token
ids, and extends a prompt by new messages without touching the tokens before them. A tokenizer without one cannot be used
for exact rollouts: an opaque chat template can only be rendered as a whole, which rewrites history.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from openai_harmony import HarmonyError
from renderers import ParsedToolCall, Renderer, ToolCallParseStatus, config_from_name, create_renderer
from renderers.base import MODEL_RENDERER_MAP

from hermes_envs.errors import ConfigError
from hermes_envs.tools.call import ToolCall

logger = logging.getLogger(__name__)

# gpt-oss is chosen by name alone: its renderer fetches an encoding from the network when it is made.
PROBED_RENDERERS = (
    "qwen3",
    "prime-qwen3",
    "qwen3.5",
    "qwen3.6",
    "qwen3.8",
    "glm-4.5",
    "glm-5",
    "glm-5.1",
    "glm-5.3",
    "llama-3",
    "deepseek-v3",
    "deepseek-r1",
    "kimi-k2",
    "minimax-m2",
    "nemotron-3",
    "nemotron-3-ultra",
    "nemotron-3.5",
    "hy3",
    "laguna-xs.2",
    "laguna-m.1",
    "laguna-xs-2.1",
    "laguna-s-2.1",
)
RENDERER_NAMES = (*PROBED_RENDERERS, "deepseek-v4", "gemma4", "gpt-oss", "inkling", "kimi-k2.5", "qwen3-vl")
"""What `renderer` may name beside `auto`."""

# What constructors and template renders of a renderer that does not suit the tokenizer have been seen to raise.
UNSUITABLE = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, jinja2.TemplateError, HarmonyError)

_PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Run a command.",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        },
    }
]
_PROBE_PROMPT: list[dict[str, Any]] = [
    {"role": "system", "content": "You are careful."},
    {"role": "user", "content": "List the files."},
]
_PROBE_CALL = {"id": "call_0", "type": "function", "function": {"name": "bash", "arguments": {"command": "ls"}}}
_PROBE_TURN: list[dict[str, Any]] = [
    {"role": "assistant", "content": "I look.", "tool_calls": [_PROBE_CALL]},
    {"role": "tool", "tool_call_id": "call_0", "name": "bash", "content": "a.py"},
]


_FAULTS = {
    ToolCallParseStatus.OK: "the tool call does not name a tool",
    ToolCallParseStatus.MISSING_NAME: "the tool call does not name a tool",
    ToolCallParseStatus.UNKNOWN_TOOL: "the tool call names a tool that there is not",
    ToolCallParseStatus.UNCLOSED_BLOCK: "the tool call was not closed before the answer ended",
}


@dataclass(frozen=True)
class ParsedAnswer:
    """What the model meant by its tokens. `tool_calls` has malformed calls too, in the order in which they were made."""

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


class ChatRenderer:
    """Turns messages of one model family into tokens and its tokens into answers."""

    def __init__(self, name: str, tokenizer: Any, renderer: Renderer) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._renderer = renderer
        self.stop_token_ids = tuple(renderer.get_stop_token_ids())
        self.stop_texts = tuple(self.decode([token]) for token in self.stop_token_ids)
        self.vocabulary_size = len(tokenizer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included. Broken UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        """The whole conversation, up to where the model's next turn begins."""
        return list(self._renderer.render_ids(_for_template(messages), tools=_specs(tools), add_generation_prompt=True))

    def next_prompt(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        new_messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
    ) -> list[int] | None:
        """The last turn's prompt and completion to the letter, then the new messages up to where the next turn begins.

        None where the model family's template changes history at this point, so that nothing but a fresh prompt will do:
        Qwen3's, for example, drops the reasoning of all earlier turns when the user asks something new.
        """
        bridged = self._renderer.bridge_to_next_turn(
            list(prompt_ids), list(completion_ids), _for_template(new_messages), tools=_specs(tools)
        )
        return None if bridged is None else list(bridged.token_ids)

    def parse(
        self,
        completion_ids: Sequence[int],
        prompt_ids: Sequence[int],
        tools: Sequence[dict[str, Any]],
        call_id_prefix: str,
    ) -> ParsedAnswer:
        """Read an answer from its token ids. Calls whose format has no ids of its own get `call_id_prefix` and a number."""
        try:
            parsed = self._renderer.parse_response(list(completion_ids), tools=_specs(tools), prompt_ids=list(prompt_ids))
        # What a model wrote can trip a parser (brackets nested by the thousand, numbers of thousands of digits); that is
        # the model's doing and no reason to lose the trajectory.
        except (*UNSUITABLE, RecursionError) as reason:
            text = self.decode([token for token in completion_ids if token not in self.stop_token_ids])
            call = ToolCall(f"{call_id_prefix}_0", "", None, text, f"the answer could not be parsed: {reason}")
            return ParsedAnswer("", None, (call,))
        calls = tuple(_tool_call(call, f"{call_id_prefix}_{number}") for number, call in enumerate(parsed.tool_calls))
        return ParsedAnswer(parsed.content, parsed.reasoning_content, calls)


def create_chat_renderer(tokenizer: Any, name: str = "auto") -> ChatRenderer:
    """Make the renderer for a tokenizer, without touching the network.

    `auto` goes by the tokenizer's name where that is a published model's, else takes the first renderer that agrees with the
    tokenizer's own chat template, token for token, on a conversation with tools.

    Raises:
        ConfigError: `name` is unknown, does not suit the tokenizer, or no renderer agrees with the template.
    """
    if name == "auto":
        return _automatic(tokenizer)
    if name not in RENDERER_NAMES:
        raise ConfigError(f"renderer: {name!r} is unknown; use auto or one of {', '.join(RENDERER_NAMES)}")
    try:
        return _create(tokenizer, name)
    except UNSUITABLE as reason:
        raise ConfigError(f"renderer: {name!r} does not suit the tokenizer {tokenizer.name_or_path!r}: {reason}") from reason


def _create(tokenizer: Any, name: str) -> ChatRenderer:
    return ChatRenderer(name, tokenizer, create_renderer(tokenizer, config_from_name(name)))


def _automatic(tokenizer: Any) -> ChatRenderer:
    published = MODEL_RENDERER_MAP.get(tokenizer.name_or_path)
    if published is not None:
        return _create(tokenizer, published)
    for name in PROBED_RENDERERS:
        try:
            candidate = _create(tokenizer, name)
            agrees = all(
                candidate.prompt(probe, _PROBE_TOOLS) == _template_ids(tokenizer, probe)
                for probe in (_PROBE_PROMPT, _PROBE_PROMPT + _PROBE_TURN)
            )
        except UNSUITABLE as reason:
            logger.debug("renderer %s does not suit %s: %s", name, tokenizer.name_or_path, reason)
            continue
        if agrees:
            return candidate
    raise ConfigError(
        f"renderer: no renderer agrees with the chat template of the tokenizer {tokenizer.name_or_path!r}; "
        f"name the model's family, one of {', '.join(RENDERER_NAMES)}"
    )


def _template_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            messages, tools=_PROBE_TOOLS, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def _specs(tools: Sequence[dict[str, Any]]) -> Any:
    return list(tools) or None


def _for_template(messages: Sequence[dict[str, Any]]) -> Any:
    """Arguments as objects: templates write them as JSON themselves, and some cannot take a string."""
    return [
        message | {"tool_calls": [_with_object_arguments(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    parsed = ToolCall.parse(call.get("id", ""), function["name"], function.get("arguments"))
    if parsed.arguments is None:
        return call
    return call | {"function": function | {"arguments": parsed.arguments}}


def _tool_call(call: ParsedToolCall, new_id: str) -> ToolCall:
    id = call.id or new_id
    # A model may write anything as the name, a number or a list among it.
    name = call.name if isinstance(call.name, str) else ""
    if call.status == ToolCallParseStatus.OK and name:
        return ToolCall.parse(id, name, call.arguments, call.raw)
    return ToolCall(id, name, None, call.raw, _what_is_wrong(call))


def _what_is_wrong(call: ParsedToolCall) -> str:
    if call.status == ToolCallParseStatus.INVALID_JSON:
        try:
            json.loads(call.raw)
        except (ValueError, RecursionError) as reason:
            return f"the tool call is not valid JSON: {reason}"
    return _FAULTS.get(call.status, "the tool call does not have the form that was asked for")
