"""Numbers in cells."""

from typing import Any, Optional


def is_number(value: Any) -> bool:
    """Whether a cell's value is aligned and summed as a number; booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def group_digits(digits: str, separator: str) -> str:
    """Put ``separator`` between groups of three digits, counted from the right."""
    groups = []
    while len(digits) > 3:
        groups.insert(0, digits[-3:])
        digits = digits[:-3]
    return separator.join([digits, *groups])


def format_number(value: Any, decimals: Optional[int] = None, thousands: str = "") -> str:
    """Write a number, with a fixed count of ``decimals`` and a ``thousands`` separator if they are given.

    The sign stands before the first digit; what rounds to zero has none.
    """
    text = str(value) if decimals is None else f"{value:.{decimals}f}"
    if "e" in text or "n" in text:
        return text
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    whole, point, fraction = digits.partition(".")
    if thousands:
        whole = group_digits(whole, thousands)
    if not (whole + fraction).strip("0"):
        sign = ""
    return sign + whole + point + fraction
