"""A model's tool call and what it got back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


class UnusableCallError(Exception):
    """A call that cannot be run as the model made it; the text tells the model why."""


@dataclass(frozen=True)
class ToolCall:
    """One call as the model made it.

    `arguments` is None exactly when `error` says why the call could not be understood; `raw` is always what the model wrote,
    so that a malformed call can be shown and answered beside the good ones.
    """

    id: str
    name: str
    arguments: dict[str, Any] | None
    raw: str = ""
    error: str | None = None
    text: str | None = None
    """Arguments that are plain text: a tool that needs one text, and nothing else, can still be called with it."""

    @classmethod
    def parse(cls, id: str, name: str, arguments: object, raw: str = "") -> ToolCall:
        """Normalise arguments that come as a dict, as JSON text of an object, or as nothing.

        Anything else gives a call with `error` set, in words that the model can act on.
        """
        if arguments is None or arguments == "":
            return cls(id, name, {}, raw)
        if isinstance(arguments, str):
            written = arguments
            try:
                arguments = json.loads(written)
            # A RecursionError is what thousands of nested brackets give.
            except (ValueError, RecursionError) as reason:
                plain = None if written.lstrip().startswith(("{", "[", '"')) else written
                return cls(id, name, None, raw or written, f"arguments are not valid JSON: {reason}", plain)
        if isinstance(arguments, dict):
            try:
                # Python's parser lets through what no other program can read: NaN, Infinity and lone surrogates.
                json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
            except (ValueError, RecursionError) as reason:
                return cls(id, name, None, raw or repr(arguments), f"arguments are not valid JSON: {reason}")
            return cls(id, name, arguments, raw)
        return cls(id, name, None, raw or str(arguments), f"arguments must be a JSON object, not {type(arguments).__name__}")


@dataclass(frozen=True)
class ToolResult:
    """What the model gets to read. `ok` is false when the tool reported a failure or the call could not be run at all."""

    call: ToolCall
    content: str
    ok: bool
    executed: bool = True
