import pytest

from exprcalc import evaluate, parse, simplify, to_text, variables_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1+2*3", "1 + 2 * 3"),
        ("(1+2)*3", "(1 + 2) * 3"),
        ("a-(b-c)", "a - (b - c)"),
        ("(a-b)-c", "a - b - c"),
        ("(a^b)^c", "(a ^ b) ^ c"),
        ("a^(b^c)", "a ^ b ^ c"),
        ("-(a+b)", "-(a + b)"),
        ("(-a)^2", "(-a) ^ 2"),
        ("not (a and b)", "not (a and b)"),
        ("max( 1,(2) )", "max(1, 2)"),
    ],
)
def test_to_text(text, expected):
    assert to_text(parse(text)) == expected
    assert parse(expected) == parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x + 0", "x"),
        ("0 + x", "x"),
        ("x - 0", "x"),
        ("0 - x", "0 - x"),
        ("1 * x", "x"),
        ("x / 1", "x"),
        ("1 / x", "1 / x"),
        ("x ^ 1", "x"),
        ("--x", "x"),
        ("2 * 3 + x", "6 + x"),
        ("x * (3 - 2)", "x"),
        ("1 / 0", "1 / 0"),
        ("max(1 + 1, x)", "max(2, x)"),
    ],
    ids=lambda value: value.replace("x", "[x]"),
)
def test_simplify(text, expected):
    assert to_text(simplify(parse(text))) == expected


def test_simplified_has_the_same_value():
    text = "1 * x + 0 - (4 - 2) ^ 1 * --x"
    assert evaluate(to_text(simplify(parse(text))), {"x": 7}) == evaluate(text, {"x": 7}) == -7


def test_variables():
    assert variables_of(parse("max(a, -b) * pi + if(c > 1, a, 2)")) == {"a", "b", "c"}
