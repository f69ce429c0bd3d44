import math

import pytest

from exprcalc import EvaluationError, evaluate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 4 - 3", 3),
        ("2 ^ 3 ^ 2", 512),
        ("2 ** 3", 8),
        ("-2 ^ 2", -4),
        ("(-2) ^ 2", 4),
        ("2 ^ -1", 0.5),
        ("- -3", 3),
        ("-2 * -3", 6),
        ("7 // 2 + 7 % 2", 4),
        ("1e3 + .5", 1000.5),
        ("2 * pi", 2 * math.pi),
    ],
)
def test_arithmetic(text, expected):
    assert evaluate(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 < 2 and 2 < 3", True),
        ("not 1 > 2 or false", True),
        ("not (1 < 2)", False),
        ("1 + 1 == 2", True),
        ("3 >= 3 and 3 <= 3", True),
        ("true or missing", True),
        ("false and missing", False),
    ],
)
def test_logic(text, expected):
    assert evaluate(text) is expected


def test_variables_hide_constants():
    assert evaluate("e + x", {"e": 1, "x": 2}) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("min(3, 1, 2)", 1),
        ("max(3)", 3),
        ("abs(-2)", 2),
        ("clamp(15, 0, 10)", 10),
        ("clamp(-5, 0, 10)", 0),
        ("average(1, 2, 6)", 3),
        ("log(8, 2)", 3),
        ("round(2.5)", 3),
        ("round(-2.5)", -3),
        ("round(1.25, 1)", 1.3),
        ("if(1 < 2, 10, missing)", 10),
        ("if(1 > 2, missing, 20)", 20),
    ],
    ids=lambda value: f"[{value}]" if isinstance(value, str) else None,
)
def test_functions(text, expected):
    assert evaluate(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("missing + 1", "unknown name 'missing'"),
        ("launch()", "unknown function 'launch'"),
        ("sqrt(1, 2)", "sqrt takes 1 argument, not 2"),
        ("clamp(1, 2)", "clamp takes 3 arguments, not 2"),
        ("round()", "round takes 1 to 2 arguments, not 0"),
        ("max()", "max takes at least 1 arguments, not 0"),
        ("sqrt(-1)", "sqrt: "),
        ("clamp(1, 5, 2)", "upper bound"),
        ("2 ^ 10001", "larger than 10000"),
        ("0 ^ -1", "has no value"),
        ("(-8) ^ 0.5", "no real value"),
    ],
)
def test_no_value(text, message):
    with pytest.raises(EvaluationError, match=message.replace("(", r"\(")):
        evaluate(text)


def test_largest_exponent():
    assert evaluate("1 ^ 10000") == 1
