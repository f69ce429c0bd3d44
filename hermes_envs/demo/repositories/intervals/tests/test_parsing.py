import pytest

from intervals import Interval, format_clock, parse_clock, parse_hours, parse_interval, parse_set


def test_decimal_bounds():
    assert parse_interval(" [ 0.5,2 ) ") == Interval(0.5, 2)


@pytest.mark.parametrize("text", ["[1, 2]", "(1, 2)", "[1 2)", "", "[a, b)", "[2, 1)"])
def test_malformed_interval(text):
    with pytest.raises(ValueError):
        parse_interval(text)


@pytest.mark.parametrize(("text", "minutes"), [("00:00", 0), ("9:05", 545), ("23:59", 1439), ("24:00", 1440)])
def test_clock(text, minutes):
    assert parse_clock(text) == minutes


@pytest.mark.parametrize("text", ["24:01", "12:60", "noon", "1:2", "99:00"])
def test_no_such_clock(text):
    with pytest.raises(ValueError, match="time of day"):
        parse_clock(text)


def test_clock_is_written_with_two_digits():
    assert format_clock(545) == "09:05"


def test_hours():
    assert parse_hours("09:00-12:30, 13:30-18:00") == parse_set("[540, 750) | [810, 1080)")


def test_hours_past_midnight():
    assert parse_hours("22:00-02:00") == parse_set("[0, 120) | [1320, 1440)")


def test_hours_need_a_dash():
    with pytest.raises(ValueError, match="range of hours"):
        parse_hours("09:00")
