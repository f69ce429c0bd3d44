"""Tables from comma-separated text, and back."""

from typing import Any, List

from tabletext.table import Table


def _value(text: str, quoted: bool) -> Any:
    """A cell's value: quoted cells are text, others may be numbers, and nothing at all is None."""
    if quoted:
        return text
    text = text.strip()
    if not text:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def split_line(line: str, delimiter: str = ",") -> List[Any]:
    """Cut one line into values. A quote inside quotes is doubled.

    Raises:
        ValueError: a quote is never closed.
    """
    values: List[Any] = []
    position = 0
    while True:
        if line[position : position + 1] == '"':
            text, position = _quoted(line, position)
            values.append(_value(text, quoted=True))
        else:
            end = line.find(delimiter, position)
            end = len(line) if end < 0 else end
            values.append(_value(line[position:end], quoted=False))
            position = end
        if position >= len(line):
            return values
        position += len(delimiter)


def _quoted(line: str, position: int) -> "tuple[str, int]":
    """The text of the quoted cell that starts at ``position``, and where it ends."""
    text = ""
    position += 1
    while position < len(line):
        if line[position] != '"':
            text += line[position]
            position += 1
        elif line[position + 1 : position + 2] == '"':
            text += '"'
            position += 2
        else:
            return text, position + 1
    raise ValueError(f"unclosed quote in {line!r}")


def parse_csv(text: str, delimiter: str = ",") -> Table:
    """Read a heading and rows; empty lines are skipped.

    Raises:
        ValueError: there is no heading, or a line is malformed.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("no heading")
    table = Table([str(title) for title in split_line(lines[0], delimiter)])
    for line in lines[1:]:
        table.add_row(split_line(line, delimiter))
    return table


def to_csv(table: Table, delimiter: str = ",") -> str:
    """Write heading and rows; text is quoted where reading it back would change it."""
    rows = [[column.title for column in table.columns], *table.rows]
    return "".join(delimiter.join(_field(value, delimiter) for value in row) + "\n" for row in rows)


def _field(value: Any, delimiter: str) -> str:
    if value is None:
        return ""
    text = str(value)
    ambiguous = isinstance(value, str) and _value(text, quoted=False) != text
    if ambiguous or delimiter in text or '"' in text:
        return '"' + text.replace('"', '""') + '"'
    return text
