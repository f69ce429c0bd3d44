"""Messages to tokens and back.

The `renderers` library has a hand-written renderer for each model family, which renders the first prompt, parses an answer from
its token ids, and extends a prompt by new messages without changing the tokens before them. For any other tokenizer with a chat
template one is derived (`hermes_envs/rendering/derived.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openai_harmony import HarmonyError
from renderers import ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus

from hermes_envs.errors import ConfigError, EngineError, InexactRolloutError
from hermes_envs.rendering.chat_template import TEMPLATE_ERRORS
from hermes_envs.tools.call import ToolCall

UNSUITABLE = (AssertionError, *TEMPLATE_ERRORS, HarmonyError)
"""What renderers have been seen to raise, when made or used, if they do not suit the tokenizer or the conversation."""

_FAULTS = {
    ToolCallParseStatus.OK: "the tool call does not name a tool",
    ToolCallParseStatus.MISSING_NAME: "the tool call does not name a tool",
    ToolCallParseStatus.UNKNOWN_TOOL: "the tool call names a tool that there is not",
    ToolCallParseStatus.UNCLOSED_BLOCK: "the tool call was not closed before the answer ended",
}


@dataclass(frozen=True)
class ParsedAnswer:
    """A parsed answer. `tool_calls` includes malformed calls, in the order in which they were made."""

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


class FamilyRenderer(Protocol):
    """The interface that the renderers of the `renderers` library and `DerivedRenderer` share."""

    def get_stop_token_ids(self) -> list[int]: ...

    def render_ids(self, messages: Any, *, tools: Any = None, add_generation_prompt: bool = False) -> list[int]: ...

    def parse_response(self, token_ids: list[int], *, tools: Any = None, prompt_ids: Any = None) -> ParsedResponse: ...

    def bridge_to_next_turn(
        self, previous_prompt_ids: list[int], previous_completion_ids: list[int], new_messages: Any, *, tools: Any = None
    ) -> RenderedTokens | None: ...


class ChatRenderer:
    """Renders messages into the tokens of one model family, and parses its answers."""

    def __init__(self, name: str, tokenizer: Any, renderer: FamilyRenderer) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._renderer = renderer
        self.stop_token_ids = tuple(renderer.get_stop_token_ids())
        self.stop_texts = tuple(self.decode([token]) for token in self.stop_token_ids)
        self.vocabulary_size = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Special tokens that are spelled out in it are recognised; none are added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included. Invalid UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Render a whole conversation, the generation prompt of the next turn included.

        A turn with a malformed call is in the messages as plain text, so that its results answer no call. Some families
        (Mistral, Gemma) refuse such results: there they are rendered as messages of the user.

        Raises:
            ConfigError: the family cannot render the tools or the first messages.
            EngineError: the family cannot render what the model has said.
        """
        try:
            return self._render(messages, tools)
        except UNSUITABLE as refusal:
            with contextlib.suppress(*UNSUITABLE):
                return self._render(_results_of_no_call_as_questions(messages), tools)
            said = any(message["role"] == "assistant" for message in messages)
            error = EngineError if said else ConfigError
            raise error(f"renderer: {self.name!r} cannot render the conversation: {refusal}") from refusal

    def next_prompt(
        self,
        prompt_ids: list[int],
        completion_ids: list[int],
        new_messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
    ) -> list[int] | None:
        """The last turn's prompt and completion unchanged, then the new messages and the generation prompt of the next turn.

        None if the family's template changes history at this point, so that a fresh prompt is needed: Qwen3's, for example,
        drops the reasoning of all earlier turns when the user asks something new.

        Raises:
            InexactRolloutError: the renderer has changed the prompt or the completion.
        """
        bridged = self._renderer.bridge_to_next_turn(
            prompt_ids, completion_ids, _for_template(new_messages), tools=_specs(tools)
        )
        if bridged is None:
            return None
        extended, history = list(bridged.token_ids), len(prompt_ids) + len(completion_ids)
        if extended[: len(prompt_ids)] != prompt_ids or extended[len(prompt_ids) : history] != completion_ids:
            raise InexactRolloutError(f"the next prompt of renderer {self.name!r} does not begin with the turns before it")
        return extended

    def parse(
        self,
        completion_ids: list[int],
        prompt_ids: list[int],
        tools: Sequence[dict[str, Any]],
        call_id_prefix: str,
    ) -> ParsedAnswer:
        """Parse an answer from its token ids. Calls without an id get `call_id_prefix` and a number."""
        try:
            parsed = self._renderer.parse_response(completion_ids, tools=_specs(tools), prompt_ids=prompt_ids)
        # A model can write what makes a parser fail, e.g. thousands of nested brackets. The trajectory goes on: to the model
        # it is a malformed call.
        except (*UNSUITABLE, RecursionError) as reason:
            text = self.decode([token for token in completion_ids if token not in self.stop_token_ids])
            call = ToolCall(f"{call_id_prefix}_0", "", None, text, f"the answer could not be parsed: {reason}")
            return ParsedAnswer("", None, (call,))
        calls = tuple(_tool_call(call, f"{call_id_prefix}_{number}") for number, call in enumerate(parsed.tool_calls))
        return ParsedAnswer(parsed.content, parsed.reasoning_content, calls)

    def _render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        return list(self._renderer.render_ids(_for_template(messages), tools=_specs(tools), add_generation_prompt=True))


def _specs(tools: Sequence[dict[str, Any]]) -> Any:
    return list(tools) or None


def _for_template(messages: Sequence[dict[str, Any]]) -> Any:
    """Arguments as objects: templates write them as JSON themselves, and some cannot take a string.

    Only messages from outside, such as an environment's own examples, have them as text.
    """
    return [
        message | {"tool_calls": [_with_object_arguments(call) for call in message["tool_calls"]]}
        if not all(isinstance(call["function"].get("arguments"), dict) for call in message.get("tool_calls") or ())
        else message
        for message in messages
    ]


def _results_of_no_call_as_questions(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    called = False
    for message in messages:
        if message["role"] != "tool" or called:
            called = bool(message.get("tool_calls")) or (called and message["role"] == "tool")
            shown.append(message)
        elif shown and shown[-1]["role"] == "user":
            shown[-1] = {"role": "user", "content": f"{shown[-1]['content']}\n{message['content']}"}
        else:
            shown.append({"role": "user", "content": message["content"]})
    return shown


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
