import pytest

from exprcalc import SyntaxProblem, parse
from exprcalc.nodes import Binary, Call, Name, Number, Unary
from exprcalc.tokens import tokenize


def test_tokens():
    assert [(token.kind, token.text) for token in tokenize("a1 <= 2.5e-3and b")] == [
        ("name", "a1"),
        ("operator", "<="),
        ("number", "2.5e-3"),
        ("operator", "and"),
        ("name", "b"),
        ("end", ""),
    ]


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("1 + ", 4, "unexpected end"),
        ("(1 + 2", 6, r"expected '\)'"),
        ("1 + $", 4, r"unexpected '\$'"),
        ("1 2", 2, "unexpected '2'"),
        ("max(1 2)", 6, "expected ','"),
        ("1 + 2.3.4", 4, "malformed number"),
        ("* 3", 0, r"unexpected '\*'"),
        ("", 0, "unexpected end"),
    ],
)
def test_problem(text, position, message):
    with pytest.raises(SyntaxProblem, match=message) as caught:
        parse(text)
    assert caught.value.position == position


def test_pointer():
    with pytest.raises(SyntaxProblem) as caught:
        parse("1 + $")
    assert caught.value.pointer() == "1 + $\n    ^"


def test_calls():
    assert parse("f(x, 1 + 2)") == Call("f", (Name("x"), Binary("+", Number(1), Number(2))))
    assert parse("f()") == Call("f", ())


def test_sign_binds_looser_than_power():
    assert parse("-x ^ 2") == Unary("-", Binary("^", Name("x"), Number(2)))


def test_not_binds_looser_than_comparison():
    assert parse("not a < b") == Unary("not", Binary("<", Name("a"), Name("b")))
