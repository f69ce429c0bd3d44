import pytest

from intervals import Calendar, Interval, IntervalSet


@pytest.fixture
def office():
    """A day with two meetings; times in minutes after midnight."""
    calendar = Calendar()
    calendar.book("stand-up", Interval(9 * 60, 9 * 60 + 30))
    calendar.book("review", Interval(14 * 60, 16 * 60))
    return calendar


@pytest.fixture
def odd_hours():
    """[1, 2) | [3, 4) | [5, 6)"""
    return IntervalSet(Interval(n, n + 1) for n in (1, 3, 5))
