import pytest

from tabletext import display_width, wrap


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("one two three", 7, ["one two", "three"]),
        ("one two three", 13, ["one two three"]),
        ("one\ntwo", 10, ["one", "two"]),
        ("a  b", 10, ["a b"]),
        ("", 4, [""]),
        ("see abcdefghij", 4, ["see", "abcd", "efgh", "ij"]),
        ("abcdefgh ij", 4, ["abcd", "efgh", "ij"]),
        ("日本語", 4, ["日本", "語"]),
    ],
)
def test_wrap(text, width, expected):
    assert wrap(text, width) == expected


@pytest.mark.parametrize("width", range(2, 12))
def test_nothing_is_lost(width):
    text = "the quick brownish-foxes jump over 日本 dogs"
    wrapped = wrap(text, width)
    assert "".join(wrapped).replace(" ", "") == text.replace(" ", "")
    assert max(display_width(line) for line in wrapped) <= width


def test_no_columns():
    with pytest.raises(ValueError, match="at least one"):
        wrap("text", 0)
