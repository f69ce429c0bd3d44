"""Sets of points, kept as the fewest possible intervals."""

from bisect import bisect_right
from typing import Any, Iterable, Iterator, List, Optional

from intervals.interval import Interval


def merge(intervals: Iterable[Interval]) -> List[Interval]:
    """The fewest intervals with the same points, in order. What overlaps or touches becomes one; empty ones vanish."""
    merged: List[Interval] = []
    for interval in sorted(intervals):
        if interval.is_empty:
            continue
        if merged and interval.start <= merged[-1].end:
            merged[-1] = merged[-1].hull(interval)
        else:
            merged.append(interval)
    return merged


class IntervalSet:
    """An immutable set of points made of disjoint intervals that do not touch."""

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        self._intervals = merge(intervals)

    def __iter__(self) -> Iterator[Interval]:
        return iter(self._intervals)

    def __len__(self) -> int:
        return len(self._intervals)

    def __bool__(self) -> bool:
        return bool(self._intervals)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntervalSet):
            return NotImplemented
        return self._intervals == other._intervals

    def __hash__(self) -> int:
        return hash(tuple(self._intervals))

    def __repr__(self) -> str:
        return f"IntervalSet({self})"

    def __str__(self) -> str:
        return " | ".join(str(interval) for interval in self._intervals) or "nothing"

    def __contains__(self, point: Any) -> bool:
        return self.find(point) is not None

    def find(self, point: Any) -> Optional[Interval]:
        """The interval that holds ``point``, or None."""
        position = bisect_right([interval.start for interval in self._intervals], point) - 1
        if position < 0:
            return None
        candidate = self._intervals[position]
        return candidate if point in candidate else None

    @property
    def hull(self) -> Optional[Interval]:
        """The smallest interval that covers the set, or None for the empty set."""
        if not self._intervals:
            return None
        return Interval(self._intervals[0].start, self._intervals[-1].end)

    def total_length(self, zero: Any = 0) -> Any:
        """The sum of all lengths; ``zero`` starts the sum, for types such as timedelta."""
        return sum((interval.length for interval in self._intervals), zero)

    def union(self, other: "IntervalSet") -> "IntervalSet":
        """The points in either set."""
        return IntervalSet([*self, *other])

    def intersection(self, other: "IntervalSet") -> "IntervalSet":
        """The points in both sets."""
        left, right = list(self), list(other)
        common: List[Interval] = []
        i = j = 0
        while i < len(left) and j < len(right):
            shared = left[i].intersection(right[j])
            if shared is not None:
                common.append(shared)
            if left[i].end <= right[j].end:
                i += 1
            else:
                j += 1
        return IntervalSet(common)

    def difference(self, other: "IntervalSet") -> "IntervalSet":
        """The points of this set that are not in ``other``."""
        remaining: List[Interval] = []
        for interval in self:
            start = interval.start
            for hole in other:
                if not hole.overlaps(interval):
                    continue
                if hole.start > start:
                    remaining.append(Interval(start, hole.start))
                start = max(start, hole.end)
            if start < interval.end:
                remaining.append(Interval(start, interval.end))
        return IntervalSet(remaining)

    def symmetric_difference(self, other: "IntervalSet") -> "IntervalSet":
        """The points in exactly one of the sets."""
        return self.difference(other).union(other.difference(self))

    def complement(self, within: Interval) -> "IntervalSet":
        """The points of ``within`` that are not in the set."""
        return IntervalSet([within]).difference(self)

    def gaps(self) -> "IntervalSet":
        """The holes between the set's intervals."""
        hull = self.hull
        return IntervalSet() if hull is None else self.complement(hull)

    __or__ = union
    __and__ = intersection
    __sub__ = difference
    __xor__ = symmetric_difference
