"""Cutting text into tokens."""

from dataclasses import dataclass
from typing import Iterator

from exprcalc.errors import SyntaxProblem

OPERATORS = ("**", "//", "<=", ">=", "==", "!=", "+", "-", "*", "/", "%", "^", "<", ">", "(", ")", ",")
WORDS = ("and", "or", "not")


@dataclass(frozen=True)
class Token:
    """``kind`` is ``number``, ``name``, ``operator`` or ``end``."""

    kind: str
    text: str
    position: int


def tokenize(text: str) -> Iterator[Token]:
    """The tokens of ``text`` and an ``end`` after them. ``**`` is read as ``^``.

    Raises:
        SyntaxProblem: a character that begins no token, or a malformed number.
    """
    position = 0
    while position < len(text):
        character = text[position]
        if character.isspace():
            position += 1
        elif character.isdigit() or character == ".":
            end = _end_of_number(text, position)
            yield Token("number", text[position:end], position)
            position = end
        elif character.isalpha() or character == "_":
            end = position
            while end < len(text) and (text[end].isalnum() or text[end] == "_"):
                end += 1
            word = text[position:end]
            yield Token("operator" if word in WORDS else "name", word, position)
            position = end
        else:
            operator = next((candidate for candidate in OPERATORS if text.startswith(candidate, position)), None)
            if operator is None:
                raise SyntaxProblem(f"unexpected {character!r}", text, position)
            yield Token("operator", "^" if operator == "**" else operator, position)
            position += len(operator)
    yield Token("end", "", len(text))


def _end_of_number(text: str, start: int) -> int:
    """Where the number ends that starts at ``start``: digits, one point, and an exponent."""
    end = start
    points = 0
    while end < len(text) and (text[end].isdigit() or text[end] == "."):
        points += text[end] == "."
        end += 1
    if points > 1 or text[start:end] == ".":
        raise SyntaxProblem(f"malformed number {text[start:end]!r}", text, start)
    if end < len(text) and text[end] in "eE":
        exponent = end + 1
        if exponent < len(text) and text[exponent] in "+-":
            exponent += 1
        if exponent < len(text) and text[exponent].isdigit():
            end = exponent
            while end < len(text) and text[end].isdigit():
                end += 1
    return end
