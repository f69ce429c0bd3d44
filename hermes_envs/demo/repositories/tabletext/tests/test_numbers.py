import pytest

from tabletext import format_number, is_number


@pytest.mark.parametrize(
    ("value", "decimals", "thousands", "expected"),
    [
        (7, None, "", "7"),
        (1234567, None, ",", "1,234,567"),
        (123, None, ",", "123"),
        (-123, None, ",", "-123"),
        (-1234.5, 2, ",", "-1,234.50"),
        (0.126, 2, "", "0.13"),
        (-0.001, 2, "", "0.00"),
        (1e30, None, ",", "1e+30"),
        (float("nan"), 2, ",", "nan"),
    ],
)
def test_format_number(value, decimals, thousands, expected):
    assert format_number(value, decimals, thousands) == expected


def test_booleans_are_no_numbers():
    assert is_number(0)
    assert is_number(1.5)
    assert not is_number(True)
    assert not is_number("1")
