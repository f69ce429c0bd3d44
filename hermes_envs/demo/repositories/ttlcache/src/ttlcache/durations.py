"""Durations as text: ``1h30m``, ``250ms``, ``2d``."""

import re

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms])")


def parse_duration(text: str) -> float:
    """Read a duration in seconds. Parts add up and each unit is used at most once; a bare number means seconds.

    Raises:
        ValueError: the text is no duration.
    """
    text = text.strip().lower()
    try:
        seconds = float(text)
    except ValueError:
        return _parse_parts(text)
    if seconds < 0:
        raise ValueError(f"a duration cannot be negative: {text!r}")
    return seconds


def _parse_parts(text: str) -> float:
    total = 0.0
    seen = set()
    position = 0
    while position < len(text):
        match = _PART.match(text, position)
        if match is None:
            raise ValueError(f"not a duration: {text!r}")
        amount, unit = match.groups()
        if unit in seen:
            raise ValueError(f"{unit!r} twice in {text!r}")
        seen.add(unit)
        total += float(amount) * _UNITS[unit]
        position = match.end()
    if not seen:
        raise ValueError(f"not a duration: {text!r}")
    return total


def format_duration(seconds: float) -> str:
    """Write a duration with its two largest units, the smaller one rounded down: ``1h30m``, ``2d``, ``250ms``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    rest = int(seconds)
    parts = []
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, int(_UNITS[unit]))
        if count:
            parts.append(f"{count}{unit}")
        elif parts:
            break
        if len(parts) == 2:
            break
    return "".join(parts)
