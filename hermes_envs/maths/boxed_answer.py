"""Finds the answer that a response ends with."""

from __future__ import annotations

MAX_CHARS = 100
r"""No longer than what anybody would put into \boxed{}; parsers take long for nonsense."""

_BOX = r"\boxed{"


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` of a text holds, whatever other boxes say; None without one that is closed and short."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    content = text[start + len(_BOX) :][: MAX_CHARS + 1]
    depth = 1
    for position, character in enumerate(content):
        if content[position - 1 : position] == "\\":
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:position].strip()
    return None
