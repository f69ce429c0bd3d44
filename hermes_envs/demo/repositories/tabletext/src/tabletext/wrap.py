"""Breaking text into lines that fit."""

from typing import List

from tabletext.width import character_width, display_width


def _split_word(word: str, width: int) -> List[str]:
    """Cut a word into pieces of at most ``width`` columns."""
    pieces: List[str] = []
    piece, used = "", 0
    for character in word:
        columns = character_width(character)
        if piece and used + columns > width:
            pieces.append(piece)
            piece, used = "", 0
        piece += character
        used += columns
    if piece:
        pieces.append(piece)
    return pieces


def wrap(text: str, width: int) -> List[str]:
    """Break ``text`` into lines of at most ``width`` columns, between words where that is possible.

    Newlines in the text stay, and the result has at least one line. A word that is longer than a line starts on its own.

    Raises:
        ValueError: ``width`` is not positive.
    """
    if width < 1:
        raise ValueError("a line needs at least one column")
    lines: List[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if display_width(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            *full, line = _split_word(word, width)
            lines.extend(full)
        lines.append(line)
    return lines
