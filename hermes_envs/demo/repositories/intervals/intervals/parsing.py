"""Intervals as text: ``[1, 5)`` for numbers and ``09:00-12:30`` for times of day, in minutes after midnight."""

import re
from typing import Union

from intervals.interval import Interval
from intervals.interval_set import IntervalSet

MINUTES_PER_HOUR = 60
MINUTES_PER_DAY = 24 * MINUTES_PER_HOUR

_INTERVAL = re.compile(r"\[\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\)")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})")


def _number(text: str) -> Union[int, float]:
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_interval(text: str) -> Interval:
    """Read ``[start, end)`` with whole or decimal numbers.

    Raises:
        ValueError: the text has another form, a bound is no number, or it ends before it starts.
    """
    match = _INTERVAL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not an interval: {text!r}")
    return Interval(_number(match[1]), _number(match[2]))


def parse_set(text: str) -> IntervalSet:
    """Read intervals separated by ``|``; ``nothing`` is the empty set.

    Raises:
        ValueError: as `parse_interval`.
    """
    if text.strip() == "nothing":
        return IntervalSet()
    return IntervalSet(parse_interval(part) for part in text.split("|"))


def parse_clock(text: str) -> int:
    """Read a time of day as minutes after midnight. ``24:00`` is the end of the day.

    Raises:
        ValueError: there is no such time of day.
    """
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a time of day: {text!r}")
    hours, minutes = int(match[1]), int(match[2])
    total = hours * MINUTES_PER_HOUR + minutes
    if minutes >= MINUTES_PER_HOUR or total > MINUTES_PER_DAY:
        raise ValueError(f"no such time of day: {text!r}")
    return total


def format_clock(minutes: int) -> str:
    """Write minutes after midnight as ``HH:MM``."""
    hours, rest = divmod(minutes, MINUTES_PER_HOUR)
    return f"{hours:02d}:{rest:02d}"


def parse_hours(text: str) -> IntervalSet:
    """Read opening hours such as ``09:00-12:30, 13:30-18:00``. A range that ends before it starts goes past midnight.

    Raises:
        ValueError: as `parse_clock`, or a range without a dash.
    """
    ranges = []
    for part in text.split(","):
        opening, dash, closing = part.partition("-")
        if not dash:
            raise ValueError(f"not a range of hours: {part.strip()!r}")
        start, end = parse_clock(opening), parse_clock(closing)
        if start <= end:
            ranges.append(Interval(start, end))
        else:
            ranges.append(Interval(start, MINUTES_PER_DAY))
            ranges.append(Interval(0, end))
    return IntervalSet(ranges)
