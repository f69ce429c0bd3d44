import pytest

from intervals import Interval, IntervalSet, parse_set


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[1, 4) | [3, 8)", "[1, 8)"),
        ("[5, 6) | [1, 2)", "[1, 2) | [5, 6)"),
        ("[1, 4) | [4, 8)", "[1, 8)"),
        ("[1, 9) | [2, 3)", "[1, 9)"),
        ("[1, 1) | [2, 3)", "[2, 3)"),
    ],
)
def test_normal_form(given, expected):
    assert str(parse_set(given)) == expected


@pytest.mark.parametrize(
    ("left", "operator", "right", "expected"),
    [
        ("[0, 10)", "-", "[3, 4)", "[0, 3) | [4, 10)"),
        ("[0, 10)", "-", "[0, 4) | [6, 10)", "[4, 6)"),
        ("[0, 4) | [6, 9)", "-", "[2, 7)", "[0, 2) | [7, 9)"),
        ("[0, 4)", "-", "[0, 4)", "nothing"),
        ("[0, 5) | [7, 9)", "&", "[3, 8)", "[3, 5) | [7, 8)"),
        ("[0, 5)", "&", "[5, 9)", "nothing"),
        ("[0, 2)", "|", "[2, 3)", "[0, 3)"),
        ("[0, 6)", "^", "[4, 9)", "[0, 4) | [6, 9)"),
    ],
    ids=lambda value: value,
)
def test_operators(left, operator, right, expected):
    first, second = parse_set(left), parse_set(right)
    result = {"-": first - second, "&": first & second, "|": first | second, "^": first ^ second}[operator]
    assert result == parse_set(expected)


def test_membership(odd_hours):
    assert [n for n in range(7) if n in odd_hours] == [1, 3, 5]


def test_find(odd_hours):
    assert odd_hours.find(3.5) == Interval(3, 4)
    assert odd_hours.find(4) is None
    assert odd_hours.find(0) is None


def test_gaps(odd_hours):
    assert odd_hours.gaps() == parse_set("[2, 3) | [4, 5)")
    assert not IntervalSet().gaps()


def test_complement(odd_hours):
    assert odd_hours.complement(Interval(0, 6)) == parse_set("[0, 1) | [2, 3) | [4, 5)")


def test_total_length(odd_hours):
    assert odd_hours.total_length() == 3


def test_equal_sets_have_equal_hashes():
    assert len({parse_set("[1, 2) | [2, 3)"), parse_set("[1, 3)")}) == 1
