"""A calendar of named bookings that never overlap."""

from typing import Any, Dict, List, Optional, Tuple

from intervals.interval import Interval
from intervals.interval_set import IntervalSet
from intervals.parsing import format_clock


class ConflictError(ValueError):
    """A booking overlaps one that is already there."""


class Calendar:
    """Bookings by name, each for one interval."""

    def __init__(self) -> None:
        self._bookings: Dict[str, Interval] = {}

    def __len__(self) -> int:
        return len(self._bookings)

    def book(self, name: str, interval: Interval) -> None:
        """Add a booking. One may start in the moment in which another ends.

        Raises:
            ConflictError: the interval overlaps a booking.
            ValueError: the name is taken or the interval is empty.
        """
        if name in self._bookings:
            raise ValueError(f"{name!r} is already booked")
        if interval.is_empty:
            raise ValueError("a booking needs a length")
        for other, taken in self._bookings.items():
            if taken.overlaps(interval):
                raise ConflictError(f"{name!r} at {interval} overlaps {other!r} at {taken}")
        self._bookings[name] = interval

    def cancel(self, name: str) -> Interval:
        """Remove a booking and return its interval.

        Raises:
            KeyError: nothing of that name is booked.
        """
        return self._bookings.pop(name)

    def move(self, name: str, delta: Any) -> Interval:
        """Shift a booking by ``delta``; it stays where it was if there is no room.

        Raises:
            ConflictError: the new place overlaps another booking.
            KeyError: nothing of that name is booked.
        """
        original = self.cancel(name)
        try:
            self.book(name, original.shift(delta))
        except ConflictError:
            self._bookings[name] = original
            raise
        return self._bookings[name]

    def agenda(self) -> List[Tuple[str, Interval]]:
        """All bookings, earliest first."""
        return sorted(self._bookings.items(), key=lambda booking: booking[1])

    def busy(self) -> IntervalSet:
        """All booked time."""
        return IntervalSet(self._bookings.values())

    def free(self, within: Interval, at_least: Any = 0) -> IntervalSet:
        """The unbooked stretches of ``within`` that last ``at_least`` so long."""
        return IntervalSet(gap for gap in self.busy().complement(within) if gap.length >= at_least)

    def first_free(self, duration: Any, within: Interval) -> Optional[Interval]:
        """The earliest interval of exactly ``duration`` that could be booked, or None."""
        for gap in self.free(within, at_least=duration):
            return Interval(gap.start, gap.start + duration)
        return None

    def utilisation(self, within: Interval) -> float:
        """The booked share of ``within``, from 0 to 1. What is booked outside of it does not count."""
        if within.is_empty:
            return 0.0
        booked = self.busy().intersection(IntervalSet([within]))
        return booked.total_length() / within.length

    def report(self, within: Interval) -> List[str]:
        """One line for each booking of a day in minutes, and one for the utilisation of ``within``."""
        lines = [
            f"{format_clock(interval.start)}-{format_clock(interval.end)} {name}"
            for name, interval in self.agenda()
            if interval.overlaps(within)
        ]
        lines.append(f"booked: {self.utilisation(within):.0%}")
        return lines
