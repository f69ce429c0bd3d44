"""Half-open intervals, sets of them, and a small calendar."""

from intervals.interval import Interval
from intervals.interval_set import IntervalSet
from intervals.parsing import format_clock, parse_clock, parse_hours, parse_interval, parse_set
from intervals.schedule import Calendar, ConflictError

__all__ = [
    "Calendar",
    "ConflictError",
    "Interval",
    "IntervalSet",
    "format_clock",
    "parse_clock",
    "parse_hours",
    "parse_interval",
    "parse_set",
]
