"""A renderer for any tokenizer with a chat template, derived from what the template writes.

As docs/architecture.md "Exact tokens" says: the first prompt is the template's. The tokens between an answer and the next turn
are found by rendering a conversation whose last answer is a sentinel, followed by the new messages; what comes after the
sentinel is appended to the sampled tokens, which themselves never go through the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from renderers import ParsedResponse, RenderedTokens

from hermes_envs.errors import ConfigError
from hermes_envs.rendering.answer_grammar import AnswerGrammar
from hermes_envs.rendering.chat_template import PROBE_TOOL, TEMPLATE_ERRORS, USER, ChatTemplate, call_message, result_message

SENTINEL = "zxsentinelxz"
"""A placeholder for an answer. Letters only: no template trims, escapes or splits it."""

REASONING = "zxreasoningxz"
"""A placeholder for the reasoning of an answer."""

MARK = "zxmarkxz"
"""A placeholder for the content of a new message."""

GENERATION_CONFIG = "generation_config.json"

REMEMBERED_PROMPTS = 4096
"""Prompts of which it is remembered whether they have reasoning: at least as many as there are conversations at once."""

Message = dict[str, Any]


class DerivedRenderer:
    """The renderer of a model of which only the tokenizer is known. Implements `FamilyRenderer`."""

    def __init__(self, tokenizer: Any, *, to_compare: bool = False) -> None:
        """`to_compare`: used only to see what the template writes, so that answers need not be parseable.

        Raises:
            ConfigError: there is no chat template, or it does not end an assistant's turn with a special token.
        """
        self._tokenizer = tokenizer
        self._to_compare = to_compare
        self._template = ChatTemplate(tokenizer)
        self._added = frozenset(tokenizer.get_added_vocab().values())
        self._closing = self._closing_tokens()
        self._stops = self._stop_tokens()
        self._stop_texts = re.compile("|".join(re.escape(self._decode([token])) for token in self._stops))
        generation_prompt = self._template.generation_prompt
        self._opens_reasoning = generation_prompt.rfind("<think>") > generation_prompt.rfind("</think>")
        self._reasoning_end = self._end_of_reasoning()
        self._grammar = AnswerGrammar.of(tokenizer, self._rendered_call())
        self._reasoned: dict[int, bool] = {}
        """By the hash of a prompt that was bridged to, oldest first: whether the model has reasoned in it."""
        if not to_compare:
            self._check_answers()

    def get_stop_token_ids(self) -> list[int]:
        """The token that ends an assistant's turn in the template, then those of the tokenizer and the generation config."""
        return list(self._stops)

    def render_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """The template's own tokens.

        Raises:
            One of `TEMPLATE_ERRORS`: the template refuses the conversation.
            ConfigError: tools are offered to a template that does not show them, or whose calls cannot be read.
        """
        if tools and not self._template.takes_tools:
            raise ConfigError(
                f"renderer: the chat template of {self._name} does not show tools to the model; use a tokenizer whose template "
                "does (one named tool_use, for example), or an environment without tools"
            )
        if tools and not (self._grammar.reads_calls or self._to_compare):
            raise ConfigError(
                f"renderer: the tool calls of {self._name} have a form that cannot be read, {self._rendered_call()!r}; if the "
                "model is of a family that has a renderer, name that"
            )
        return self._template.ids(messages, tools or (), add_generation_prompt=add_generation_prompt)

    def parse_response(
        self, token_ids: Sequence[int], *, tools: Sequence[dict[str, Any]] | None = None, prompt_ids: object = None
    ) -> ParsedResponse:
        """Parse an answer from its token ids. `prompt_ids` are not needed: whether a prompt opens the reasoning is known."""
        return self._grammar.parse(
            list(token_ids), stop_ids=set(self._stops), tools=tools, prefilled_thinking=self._opens_reasoning
        )

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: Sequence[int],
        previous_completion_ids: Sequence[int],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> RenderedTokens | None:
        """The last prompt and completion unchanged, then what the template writes between them and the next turn.

        A completion without a stop token gets the turn's end as context. None if the template changes what comes before the
        new messages, e.g. because it drops reasoning or moves the tools to the last question: a fresh prompt is needed.
        """
        previous = [*previous_prompt_ids, *previous_completion_ids]
        reasoned = self._has_reasoning(previous_prompt_ids, previous_completion_ids)
        delta = self._delta(new_messages, tools or (), reasoned=reasoned)
        if delta is None:
            return None
        last = previous[-1]
        if last in self._stops:
            # Where the next role's token ends a turn, as in GLM, it must be that very token.
            if last != delta[0] and delta[0] not in self._closing:
                return None
            delta = delta[1:]
        previous += delta
        self._remember(previous, reasoned)
        return RenderedTokens(token_ids=previous, message_indices=[])

    def _delta(self, new_messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, reasoned: bool) -> list[int] | None:
        """What follows an answer, its closing token included; None if the template changes the history before it.

        Both a short history and, with tools, one with a call and its result are tried: some templates keep the reasoning of
        the last turn only, and Mistral Nemo's shows the system message in the first prompt only.
        """
        for dressed in (_with_reasoning_field, _with_reasoning_inline) if reasoned else (_plain,):
            opening = self._template.opening
            histories = [opening, [*opening, dressed(_probe_call("north")), result_message()]] if tools else [opening]
            deltas = [self._delta_after(history, dressed, new_messages, tools, reasoned=reasoned) for history in histories]
            if None not in deltas:
                return deltas[-1]
        return None

    def _delta_after(
        self,
        history: list[Message],
        dressed: Callable[[Message], Message],
        new_messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        *,
        reasoned: bool,
    ) -> list[int] | None:
        for answer in map(dressed, _answers(new_messages)):
            try:
                before = self._template.text(history, tools)
                after = self._template.text([*history, answer, *new_messages], tools)
                shows = self._shows([*history, answer], new_messages, tools)
            except TEMPLATE_ERRORS:
                continue
            said, sentinel, rest = after.partition(SENTINEL)
            end = self._stop_texts.search(rest)
            kept = not reasoned or said.count(REASONING) == 1 + sum(message["role"] == "assistant" for message in history)
            if sentinel and end and shows and kept and _extends(before, said):
                delta = self._encode(rest[end.start() :])
                # A stop that the tokenizer does not know as a token could merge with the answer's last token.
                return delta if delta[0] in self._stops else None
        return None

    def _shows(self, history: list[Message], new_messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> bool:
        """Whether the template writes all new messages: Gemma's omits results that answer no call."""
        marked = [message | {"content": MARK} for message in new_messages]
        return self._template.text([*history, *marked], tools).partition(SENTINEL)[2].count(MARK) == len(marked)

    def _has_reasoning(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bool:
        """Whether the model has reasoned in any turn. Decodes the prompt only if it was not bridged to."""
        if self._opens_reasoning:
            return True
        reasoned = self._reasoned.pop(hash(tuple(prompt_ids)), None)
        if reasoned is None:
            reasoned = self._shows_reasoning(self._decode(prompt_ids))
        return reasoned or self._shows_reasoning(self._template.generation_prompt + self._decode(completion_ids))

    def _remember(self, prompt_ids: Sequence[int], reasoned: bool) -> None:
        self._reasoned[hash(tuple(prompt_ids))] = reasoned
        if len(self._reasoned) > REMEMBERED_PROMPTS:
            del self._reasoned[next(iter(self._reasoned))]

    def _shows_reasoning(self, text: str) -> bool:
        """Whether a turn of the model, which begins after a generation prompt and ends at a stop, has reasoning."""
        generation_prompt = self._template.generation_prompt
        turns = text.split(generation_prompt)[1:] if generation_prompt else [text]
        said = [self._stop_texts.split(turn, maxsplit=1)[0] for turn in turns]
        return any("think>" in turn or self._reasoning_end in turn for turn in said)

    def _end_of_reasoning(self) -> str:
        """What the template writes between reasoning and answer; `</think>` if it shows no reasoning."""
        answer = _with_reasoning_field({"role": "assistant", "content": SENTINEL})
        text = self._template.text([*self._template.opening, answer], (), add_generation_prompt=False)
        _, reasoning, rest = text.partition(REASONING)
        return (rest.partition(SENTINEL)[0].strip() if reasoning else "") or "</think>"

    def _closing_tokens(self) -> frozenset[int]:
        """The tokens that close an answer, at the end of a conversation or before another message; may be empty."""
        last, followed = self._first_added(self._tail(())), self._first_added(self._tail([USER]))
        return frozenset() if last is None else frozenset(token for token in (followed, last) if token is not None)

    def _stop_tokens(self) -> tuple[int, ...]:
        """The template's stop token, then others. Raises: ConfigError: the template ends a turn with ordinary text."""
        found = [token for token in (self._closing or self._role_tokens()) if token is not None]
        if not found:
            raise ConfigError(
                f"renderer: the chat template of {self._name} does not end an assistant's turn with a special token, "
                f"but with {self._tail([USER])!r}; exact rollouts need one"
            )
        hints = [self._tokenizer.eos_token_id, *_generation_config_stops(str(self._tokenizer.name_or_path))]
        # A config may belong to a model with more tokens, and a stop without text would match everywhere.
        known = range(len(self._tokenizer))
        return tuple(dict.fromkeys([*found, *(token for token in hints if token in known and self._decode([token]))]))

    def _tail(self, new_messages: Sequence[Message]) -> str:
        """What the template writes after an answer without calls."""
        answer = {"role": "assistant", "content": SENTINEL}
        text = self._template.text([*self._template.opening, answer, *new_messages], (), add_generation_prompt=False)
        return text.rpartition(SENTINEL)[2]

    def _role_tokens(self) -> Iterator[int | None]:
        """The tokens that begin the messages that may follow an answer: a question, a tool's result."""
        yield self._first_added(self._tail([USER]))
        calls = [*self._template.opening, _probe_call(SENTINEL)]
        try:
            called = self._template.text(calls, [PROBE_TOOL], add_generation_prompt=False)
            answered = self._template.text([*calls, result_message()], [PROBE_TOOL], add_generation_prompt=False)
        except TEMPLATE_ERRORS:
            return
        if SENTINEL in called and answered.startswith(called):
            yield self._first_added(answered[len(called) :])

    def _check_answers(self) -> None:
        """Raises: ConfigError: the template frames an answer with more than reasoning, such as gpt-oss' channels."""
        before = self._template.text(self._template.opening, ())
        answer = {"role": "assistant", "content": SENTINEL}
        said = self._template.text([*self._template.opening, answer, USER], ()).partition(SENTINEL)[0]
        frame = re.sub(r"(<think>)?\s*</think>", "", said.removeprefix(before)).strip()
        if said.startswith(before) and frame:
            raise ConfigError(
                f"renderer: the answers of {self._name} have a form that cannot be read, they begin with {frame!r}; if the "
                "model is of a family that has a renderer, name that"
            )

    def _rendered_call(self) -> str:
        """How the template writes a call; empty if it refuses calls."""
        history = self._template.opening
        try:
            before = self._template.text(history, [PROBE_TOOL])
            after = self._template.text([*history, _probe_call("north"), result_message()], [PROBE_TOOL])
        except TEMPLATE_ERRORS:
            return ""
        said = after[len(before) :] if after.startswith(before) else after
        end = self._stop_texts.search(said)
        return said[: end.start()] if end else said

    def _first_added(self, text: str) -> int | None:
        return next((token for token in self._encode(text) if token in self._added), None)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    @property
    def _name(self) -> str:
        return repr(self._tokenizer.name_or_path)


def _answers(new_messages: Sequence[Message]) -> Iterator[Message]:
    """Sentinel answers that the new messages may follow: calls that they are the results of, and plain text."""
    results = [message for message in new_messages if message["role"] == "tool"]
    if results:
        names = [message.get("name") or PROBE_TOOL["function"]["name"] for message in results]
        ids = [str(message.get("tool_call_id", "")) for message in results]
        yield call_message("", names, ids, SENTINEL)
    yield {"role": "assistant", "content": SENTINEL}


def _extends(before: str, said: str) -> bool:
    """Whether the history is unchanged but for whitespace: Hermes 3's template omits the newline after the last response."""
    return "".join(said.split()).startswith("".join(before.split()))


def _plain(message: Message) -> Message:
    return message


def _with_reasoning_field(message: Message) -> Message:
    return message | {"reasoning_content": REASONING}


def _with_reasoning_inline(message: Message) -> Message:
    return message | {"content": f"<think>\n{REASONING}\n</think>\n\n{message['content']}"}


def _probe_call(argument: str) -> Message:
    return call_message("", [PROBE_TOOL["function"]["name"]], ["look00000"], argument)


def _generation_config_stops(name_or_path: str) -> list[Any]:
    """The end tokens of the generation config beside the tokenizer on this machine; empty if there is no such file.

    Raises:
        ConfigError: it is no generation config.
    """
    path = Path(name_or_path) / GENERATION_CONFIG
    if not path.is_file():
        try:
            cached = try_to_load_from_cache(name_or_path, GENERATION_CONFIG)
        except HFValidationError:
            return []
        if not isinstance(cached, str):
            return []
        path = Path(cached)
    try:
        end = dict(json.loads(path.read_text())).get("eos_token_id")
    except (OSError, TypeError, ValueError) as reason:
        raise ConfigError(f"tokenizer_name: {path} is no generation config: {reason}") from reason
    return end if isinstance(end, list) else [end]
