"""Messages to tokens and back: the one place that knows the `renderers` library.

`renderers` has a hand-written renderer for each model family, which renders the first prompt, reads an answer from its token
ids, and extends a prompt by new messages without touching the tokens before them. For any other tokenizer with a chat template
one is derived (`hermes_envs/derived_rendering.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openai_harmony import HarmonyError
from renderers import ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus, config_from_name, create_renderer
from renderers.base import MODEL_RENDERER_MAP

from hermes_envs.chat_template import TEMPLATE_ERRORS
from hermes_envs.derived_rendering import DerivedRenderer
from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.tools.call import ToolCall

logger = logging.getLogger(__name__)

DERIVED = "derived"

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
    "deepseek-v4",
    "gemma4",
    "inkling",
    "kimi-k2.5",
    "qwen3-vl",
)
# Chosen by name alone: its renderer fetches an encoding from the network when it is made.
GPT_OSS = "gpt-oss"
RENDERER_NAMES = (*PROBED_RENDERERS, GPT_OSS, DERIVED)
"""What `renderer` may name beside `auto`."""

# In renderers 0.1.12 their bridges lack the newline that their own prompts and the templates have after a turn.
FAULTY_BRIDGES = ("laguna-xs.2", "laguna-m.1")

# What constructors and template renders of a renderer that does not suit the tokenizer have been seen to raise.
UNSUITABLE = (AssertionError, *TEMPLATE_ERRORS, HarmonyError)

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
_PROBE_CALLS = [
    {"id": f"call0000{number}", "type": "function", "function": {"name": "bash", "arguments": {"command": command}}}
    for number, command in enumerate(("ls", "pwd"))
]
_PROBE_RESULTS: list[dict[str, Any]] = [
    {"role": "tool", "tool_call_id": call["id"], "name": "bash", "content": "a.py"} for call in _PROBE_CALLS
]
_PROBE_QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "What is in it?"}]
_PROBES = [
    _PROBE_PROMPT,
    _PROBE_PROMPT[1:],
    [
        *_PROBE_PROMPT,
        {"role": "assistant", "content": "I look.", "reasoning_content": "Where?", "tool_calls": _PROBE_CALLS[:1]},
        *_PROBE_RESULTS[:1],
    ],
    [*_PROBE_PROMPT, {"role": "assistant", "content": "", "tool_calls": _PROBE_CALLS[:1]}, *_PROBE_RESULTS[:1]],
    [*_PROBE_PROMPT, {"role": "assistant", "content": "I look.", "tool_calls": _PROBE_CALLS}, *_PROBE_RESULTS],
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


def create_chat_renderer(tokenizer: Any, name: str = "auto") -> ChatRenderer:
    """Make the renderer for a tokenizer, without touching the network unless it is gpt-oss's.

    `auto` goes by the tokenizer's name where that is a published model's with a sound renderer, else takes the first renderer
    that agrees with the tokenizer's own chat template, token for token, on conversations with tools; where none does, one is
    derived from the template.

    Raises:
        ConfigError: `name` is unknown or does not suit the tokenizer, or there is no chat template to go by.
    """
    if name not in ("auto", *RENDERER_NAMES):
        raise ConfigError(f"renderer: {name!r} is unknown; use auto or one of {', '.join(RENDERER_NAMES)}")
    try:
        if name == "auto":
            return _automatic(tokenizer)
        renderer = _create(tokenizer, name)
    except HarmonyError as reason:
        raise ConfigError(
            f"renderer: {name!r} needs the encoding o200k_base, which openai_harmony fetches from the network: {reason}; "
            "put o200k_base.tiktoken into a folder and name that in TIKTOKEN_ENCODINGS_BASE"
        ) from reason
    except UNSUITABLE as reason:
        raise ConfigError(f"renderer: {name!r} does not suit the tokenizer {tokenizer.name_or_path!r}: {reason}") from reason
    if name not in (DERIVED, GPT_OSS) and tokenizer.chat_template:
        template = ChatRenderer(DERIVED, tokenizer, DerivedRenderer(tokenizer, to_compare=True))
        if not _begin_alike(renderer, template):
            logger.warning("renderer: %r writes other prompts than the chat template of %r", name, tokenizer.name_or_path)
    return renderer


def _create(tokenizer: Any, name: str) -> ChatRenderer:
    if name == DERIVED:
        return ChatRenderer(name, tokenizer, DerivedRenderer(tokenizer))
    return ChatRenderer(name, tokenizer, create_renderer(tokenizer, config_from_name(name)))


def _automatic(tokenizer: Any) -> ChatRenderer:
    published = MODEL_RENDERER_MAP.get(tokenizer.name_or_path)
    # gpt-oss' channels are more than a template shows.
    if published is not None and (published == GPT_OSS or not tokenizer.chat_template):
        return create_chat_renderer(tokenizer, published)
    template = ChatRenderer(DERIVED, tokenizer, DerivedRenderer(tokenizer, to_compare=True))
    if published is not None and published not in FAULTY_BRIDGES:
        named = _create(tokenizer, published)
        # Models that share a renderer need not share a template: Qwen3's thinking ones of July 2025 open the reasoning.
        if _begin_alike(named, template):
            return named
    for name in PROBED_RENDERERS if _prompt(template, _PROBE_PROMPT) else ():
        try:
            candidate = _create(tokenizer, name)
            agrees = _agree(candidate, template)
        except UNSUITABLE as reason:
            logger.debug("renderer %s does not suit %s: %s", name, tokenizer.name_or_path, reason)
            continue
        if agrees:
            return candidate
    return _create(tokenizer, DERIVED)


def _begin_alike(renderer: ChatRenderer, template: ChatRenderer) -> bool:
    """Whether first prompts are the chat template's, where that takes tools at all."""
    return all(_prompt(template, first) in (None, _prompt(renderer, first)) for first in _PROBES[:2])


def _agree(candidate: ChatRenderer, template: ChatRenderer) -> bool:
    """Whether a renderer writes what the chat template does: prompts, and what comes between a turn and the next.

    One that rather renders afresh than bridges is not wrong.
    """
    if any(_prompt(candidate, messages) != _prompt(template, messages) for messages in _PROBES):
        return False
    prompt, turn = template.prompt(_PROBE_PROMPT, _PROBE_TOOLS), [*template.encode("I look."), template.stop_token_ids[0]]
    bridges = (
        [renderer.next_prompt(prompt, turn, new, _PROBE_TOOLS) for renderer in (candidate, template)]
        for new in (_PROBE_RESULTS[:1], _PROBE_RESULTS, _PROBE_QUESTION)
    )
    return all(None in pair or pair[0] == pair[1] for pair in bridges)


def _prompt(renderer: ChatRenderer, messages: list[dict[str, Any]]) -> list[int] | None:
    """A prompt with tools, None where that is refused."""
    try:
        return renderer.prompt(messages, _PROBE_TOOLS)
    except (ConfigError, EngineError):
        return None


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
