"""How many columns of a terminal a text takes."""

import re
import unicodedata

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")

ALIGNMENTS = ("left", "right", "center")


def character_width(character: str) -> int:
    """0 for a character that combines with the one before it, 2 for a wide one of East Asia, else 1."""
    if unicodedata.combining(character):
        return 0
    if unicodedata.east_asian_width(character) in ("W", "F"):
        return 2
    return 1


def display_width(text: str) -> int:
    """The columns that ``text`` takes; colour escapes take none."""
    return sum(character_width(character) for character in _ESCAPE.sub("", text))


def truncate(text: str, width: int, ellipsis: str = "…") -> str:
    """Cut ``text`` to at most ``width`` columns; a cut is marked by ``ellipsis``, which counts.

    Raises:
        ValueError: the ellipsis alone is wider than ``width``.
    """
    if display_width(text) <= width:
        return text
    room = width - display_width(ellipsis)
    if room < 0:
        raise ValueError(f"no room for {ellipsis!r} in {width} columns")
    kept = []
    for character in text:
        room -= character_width(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept) + ellipsis


def pad(text: str, width: int, align: str = "left") -> str:
    """Fill ``text`` with spaces to ``width`` columns. Centred text that cannot be in the middle leans to the left.

    Raises:
        ValueError: there is no such alignment.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"no such alignment: {align!r}")
    missing = max(0, width - display_width(text))
    if align == "left":
        return text + " " * missing
    if align == "right":
        return " " * missing + text
    before = missing // 2
    return " " * before + text + " " * (missing - before)
