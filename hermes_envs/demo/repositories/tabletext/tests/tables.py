"""Helpers for the tests."""

from tabletext import Table


def table_of(*rows, columns=("name", "count")):
    """A table with these rows."""
    table = Table(list(columns))
    for row in rows:
        table.add_row(row)
    return table


def lines(*expected):
    """Expected output, one argument a line."""
    return "\n".join(expected)
