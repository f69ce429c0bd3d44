"""A tokenizer's chat template: what it accepts, and how it writes a conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jinja2

from hermes_envs.errors import ConfigError

TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What rendering has been seen to raise: templates refuse conversations, and fail at shapes that they do not expect."""

PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_around",
        "description": "Look around.",
        "parameters": {
            "type": "object",
            "properties": {"direction": {"type": "string", "description": "Where to."}},
            "required": ["direction"],
        },
    },
}
USER: dict[str, Any] = {"role": "user", "content": "What is there?"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "You are careful."}

MISTRAL_ID_LENGTH = 9
"""Mistral's templates refuse ids of calls that have another length."""


def call_message(content: str, names: Sequence[str], ids: Sequence[str], argument: str) -> dict[str, Any]:
    """An assistant message with calls; the last of them has `argument` as its argument."""
    arguments = [*["north"] * (len(names) - 1), argument]
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": id, "type": "function", "function": {"name": name, "arguments": {"direction": value}}}
            for name, id, value in zip(names, ids, arguments, strict=True)
        ],
    }


def result_message(content: str = "A door.") -> dict[str, Any]:
    """A message with a result of the probe tool."""
    return {"role": "tool", "tool_call_id": "look00000", "name": PROBE_TOOL["function"]["name"], "content": content}


class ChatTemplate:
    """The chat template of a tokenizer, a single one or several by name.

    Of several (Hermes 3 has `default` and `tool_use`) `transformers` takes `tool_use` where there are tools.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises: ConfigError: the tokenizer has no chat template, or one that cannot render a question and its answer."""
        if not tokenizer.chat_template:
            raise ConfigError(
                f"renderer: the tokenizer {tokenizer.name_or_path!r} has no chat template; use one of an instruct model, or "
                "name the model's family"
            )
        self._tokenizer = tokenizer
        self._short_ids = f"!= {MISTRAL_ID_LENGTH}" in str(tokenizer.chat_template)
        self.takes_system = self.accepts([SYSTEM, USER], ())
        question = [SYSTEM, USER] if self.takes_system else [USER]
        if not self.accepts([*question, {"role": "assistant", "content": "A door."}, USER], ()):
            raise ConfigError(f"renderer: the chat template of {tokenizer.name_or_path!r} cannot render a conversation")
        self.opening: list[dict[str, Any]] = question
        self.takes_tools = self.accepts(question, [PROBE_TOOL]) and PROBE_TOOL["function"]["name"] in self.text(
            question, [PROBE_TOOL]
        )
        self.generation_prompt = self.text(question, ())[len(self.text(question, (), add_generation_prompt=False)) :]
        """The text between the last message and the model's first token."""

    def text(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the template writes it. Raises what the template raises: one of `TEMPLATE_ERRORS`."""
        return str(self._apply(messages, tools, add_generation_prompt, tokenize=False))

    def ids(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The tokens of `text`."""
        return list(self._apply(messages, tools, add_generation_prompt, tokenize=True))

    def accepts(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> bool:
        """Whether the template renders this conversation without an error."""
        try:
            self.text(messages, tools)
        except TEMPLATE_ERRORS:
            return False
        return True

    def _apply(self, messages: Sequence[dict[str, Any]], tools: Any, add_generation_prompt: bool, *, tokenize: bool) -> Any:
        if self._short_ids:
            messages = [with_short_ids(message) for message in messages]
        return self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
            return_dict=False,
        )


def with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The message with ids of calls that have the length which Mistral's templates require."""
    if "tool_call_id" in message:
        return message | {"tool_call_id": _short_id(message["tool_call_id"])}
    if message.get("tool_calls"):
        return message | {"tool_calls": [call | {"id": _short_id(call.get("id", ""))} for call in message["tool_calls"]]}
    return message


def _short_id(id: str) -> str:
    return id if len(id) == MISTRAL_ID_LENGTH and id.isalnum() else hashlib.sha256(id.encode()).hexdigest()[:MISTRAL_ID_LENGTH]
