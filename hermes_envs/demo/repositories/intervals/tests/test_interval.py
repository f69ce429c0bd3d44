import datetime

import pytest

from intervals import Interval


def test_end_before_start_is_refused():
    with pytest.raises(ValueError, match="cannot end"):
        Interval(5, 1)


def test_membership_includes_the_start_only():
    interval = Interval(2, 5)
    assert 2 in interval
    assert 4 in interval
    assert 5 not in interval


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        pytest.param(Interval(0, 5), Interval(3, 8), True, id="[0, 5) and [3, 8)"),
        pytest.param(Interval(0, 5), Interval(5, 8), False, id="[0, 5) and [5, 8) only touch"),
        pytest.param(Interval(0, 9), Interval(3, 4), True, id="[0, 9) around [3, 4)"),
        pytest.param(Interval(0, 9), Interval(4, 4), False, id="[0, 9) and nothing"),
        pytest.param(Interval(7, 9), Interval(1, 2), False, id="far apart"),
    ],
)
def test_overlap(left, right, expected):
    assert left.overlaps(right) is expected
    assert right.overlaps(left) is expected


def test_intersection():
    assert Interval(0, 5).intersection(Interval(3, 8)) == Interval(3, 5)
    assert Interval(0, 3).intersection(Interval(3, 8)) is None


def test_hull_ignores_the_empty_interval():
    assert Interval(4, 6).hull(Interval(0, 0)) == Interval(4, 6)
    assert Interval(4, 6).hull(Interval(1, 2)) == Interval(1, 6)


def test_split():
    assert Interval(0, 10).split_at(4) == (Interval(0, 4), Interval(4, 10))
    with pytest.raises(ValueError, match="not in"):
        Interval(0, 10).split_at(11)


def test_covers():
    assert Interval(0, 10).covers(Interval(0, 10))
    assert not Interval(0, 10).covers(Interval(5, 11))
    assert Interval(0, 10).covers(Interval(20, 20))


def test_dates():
    march = Interval(datetime.date(2024, 3, 1), datetime.date(2024, 4, 1))
    assert march.length == datetime.timedelta(days=31)
    assert datetime.date(2024, 3, 31) in march
