import pytest

from tabletext import display_width, pad, truncate


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("plain text", 10),
        ("日本", 4),
        ("ＡＢ [full width]", 17),
        ("e\u0301te\u0301", 3),
        ("\x1b[31mred\x1b[0m", 3),
        ("", 0),
    ],
    ids=["plain text", "wide [日本]", "full width", "combining accents", "colour [31m]", "empty"],
)
def test_display_width(text, width):
    assert display_width(text) == width


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [("abcdef", 6, "abcdef"), ("abcdef", 5, "abcd…"), ("abcdef", 1, "…"), ("日本語", 4, "日…"), ("日本語", 5, "日本…")],
)
def test_truncate(text, width, expected):
    assert truncate(text, width) == expected
    assert display_width(truncate(text, width)) <= width


def test_truncate_with_a_long_ellipsis():
    assert truncate("abcdefgh", 6, ellipsis="...") == "abc..."
    with pytest.raises(ValueError, match="no room"):
        truncate("abcdefgh", 2, ellipsis="...")


@pytest.mark.parametrize(
    ("align", "expected"), [("left", "ab   "), ("right", "   ab"), ("center", " ab  ")], ids=lambda value: f"[{value}]"
)
def test_pad(align, expected):
    assert pad("ab", 5, align) == expected


def test_pad_leaves_long_text():
    assert pad("abcdef", 3, "center") == "abcdef"


def test_pad_refuses_unknown_alignment():
    with pytest.raises(ValueError, match="middle"):
        pad("ab", 5, "middle")
