"""Messages to tokens and back: the one place that knows the `renderers` library.

`renderers` has a hand-written renderer for each model family, which renders the first prompt, reads an answer from its token
ids, and extends a prompt by new messages without touching the tokens before them. For any other tokenizer with a chat template
one is derived (`hermes_envs/rendering/derived.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openai_harmony import HarmonyError
from renderers import ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.rendering.chat_template import TEMPLATE_ERRORS
from hermes_envs.tools.call import ToolCall

# What constructors and template renders of a renderer that does not suit the tokenizer have been seen to raise.
UNSUITABLE = (AssertionError, *TEMPLATE_ERRORS, HarmonyError)

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


class FamilyRenderer(Protocol):
    """What the renderers of the `renderers` library and the derived one have in common."""

    def get_stop_token_ids(self) -> list[int]: ...

    def render_ids(self, messages: Any, *, tools: Any = None, add_generation_prompt: bool = False) -> list[int]: ...

    def parse_response(self, token_ids: list[int], *, tools: Any = None, prompt_ids: Any = None) -> ParsedResponse: ...

    def bridge_to_next_turn(
        self, previous_prompt_ids: list[int], previous_completion_ids: list[int], new_messages: Any, *, tools: Any = None
    ) -> RenderedTokens | None: ...


class ChatRenderer:
    """Turns messages of one model family into tokens and its tokens into answers."""

    def __init__(self, name: str, tokenizer: Any, renderer: FamilyRenderer) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._renderer = renderer
        self.stop_token_ids = tuple(renderer.get_stop_token_ids())
        self.stop_texts = tuple(self.decode([token]) for token in self.stop_token_ids)
        self.vocabulary_size = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of text, special tokens written out among it, nothing put before or after."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included. Broken UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        """The whole conversation, up to where the model's next turn begins.

        A malformed call is shown as words, and some families (Mistral, Gemma) refuse results that answer no call: there these
        are shown as a user's message.

        Raises:
            ConfigError: the family's form has no room for what is asked: tools, or a first message like this.
            EngineError: it has none for what the model has said.
        """
        refusal: Exception | None = None
        for shown in (messages, _results_of_no_call_as_questions(messages)):
            try:
                return list(self._renderer.render_ids(_for_template(shown), tools=_specs(tools), add_generation_prompt=True))
            except UNSUITABLE as reason:
                refusal = refusal or reason
        said = any(message["role"] == "assistant" for message in messages)
        error = EngineError if said else ConfigError
        raise error(f"renderer: {self.name!r} cannot render the conversation: {refusal}") from refusal

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
