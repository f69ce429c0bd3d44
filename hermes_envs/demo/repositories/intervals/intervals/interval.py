"""One half-open interval."""

from dataclasses import dataclass
from typing import Any, Optional, Tuple


@dataclass(frozen=True, order=True)
class Interval:
    """The points from ``start`` (included) to ``end`` (excluded).

    Both bounds are of the same ordered type: numbers, dates, strings. ``Interval(3, 3)`` is empty.
    """

    start: Any
    end: Any

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ValueError(f"an interval cannot end ({self.end}) before it starts ({self.start})")

    @property
    def is_empty(self) -> bool:
        """Whether no point lies in the interval."""
        return self.start == self.end

    @property
    def length(self) -> Any:
        """The distance from start to end."""
        return self.end - self.start

    def __contains__(self, point: Any) -> bool:
        return self.start <= point < self.end

    def covers(self, other: "Interval") -> bool:
        """Whether every point of ``other`` is in this interval. Every interval covers an empty one."""
        if other.is_empty:
            return True
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: "Interval") -> bool:
        """Whether some point is in both. Intervals that only touch do not overlap."""
        if self.is_empty or other.is_empty:
            return False
        return self.start < other.end and other.start < self.end

    def touches(self, other: "Interval") -> bool:
        """Whether one ends exactly where the other starts."""
        return self.end == other.start or other.end == self.start

    def intersection(self, other: "Interval") -> Optional["Interval"]:
        """The points in both, or None if there are none."""
        if not self.overlaps(other):
            return None
        return Interval(max(self.start, other.start), min(self.end, other.end))

    def hull(self, other: "Interval") -> "Interval":
        """The smallest interval that covers both; an empty interval adds nothing."""
        if self.is_empty:
            return other
        if other.is_empty:
            return self
        return Interval(min(self.start, other.start), max(self.end, other.end))

    def split_at(self, point: Any) -> Tuple["Interval", "Interval"]:
        """The part before ``point`` and the part from ``point`` on.

        Raises:
            ValueError: the point is outside of the interval.
        """
        if point not in self and point != self.end:
            raise ValueError(f"{point} is not in {self}")
        return Interval(self.start, point), Interval(point, self.end)

    def shift(self, delta: Any) -> "Interval":
        """The interval moved by ``delta``."""
        return Interval(self.start + delta, self.end + delta)

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"
