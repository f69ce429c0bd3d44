"""Which renderer suits a tokenizer."""

from __future__ import annotations

import logging
from typing import Any

from openai_harmony import HarmonyError
from renderers import config_from_name, create_renderer
from renderers.base import MODEL_RENDERER_MAP

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.rendering.chat_renderer import UNSUITABLE, ChatRenderer
from hermes_envs.rendering.derived import DerivedRenderer

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
"""The values of the option `renderer` beside `auto`."""

# In renderers 0.1.12 their bridges lack the newline that their own prompts and the templates have after a turn.
FAULTY_BRIDGES = ("laguna-xs.2", "laguna-m.1")

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


def create_chat_renderer(tokenizer: Any, name: str = "auto") -> ChatRenderer:
    """Make the renderer for a tokenizer. Needs the network for gpt-oss only.

    `auto` takes the renderer of the published model that the tokenizer is named after, if there is one and it begins prompts
    as the tokenizer's chat template does; else the first renderer that agrees with that template, token for token, on
    conversations with tools; else one that is derived from the template.

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
    # A comparison with its template could not show that gpt-oss' channels are right.
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
    """Whether first prompts are those of the chat template; prompts that the template refuses are not compared."""
    return all(_prompt(template, first) in (None, _prompt(renderer, first)) for first in _PROBES[:2])


def _agree(candidate: ChatRenderer, template: ChatRenderer) -> bool:
    """Whether a renderer writes the same prompts and the same bridges between turns as the chat template.

    Bridges are compared only where both have one: a renderer may always render a fresh prompt instead.
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
    """A prompt with tools; None if the renderer refuses it."""
    try:
        return renderer.prompt(messages, _PROBE_TOOLS)
    except (ConfigError, EngineError):
        return None
