import pytest
from tables import lines, table_of

from tabletext import GRID, MARKDOWN, Column, Table, get_style


def test_plain():
    assert table_of(("apple", 10), ("fig", 2)).render() == lines(
        "name   count",
        "-----  -----",
        "apple     10",
        "fig        2",
    )


def test_grid():
    assert table_of(("fig", 2)).render(GRID) == lines(
        "+------+-------+",
        "| name | count |",
        "+------+-------+",
        "| fig  |     2 |",
        "+------+-------+",
    )


def test_markdown_marks_alignment():
    table = Table([Column("a"), Column("b", align="center"), Column("c", align="right")])
    table.add_row(["x", "y", "z"])
    assert table.render(MARKDOWN).splitlines()[1] == "|:--|:-:|--:|"


def test_wide_characters_line_up():
    table = table_of(("日本", 1), ("fig", 2))
    assert table.render() == lines("name  count", "----  -----", "日本      1", "fig       2")


def test_wrapped_cells():
    table = Table([Column("text", max_width=5), "n"])
    table.add_row(["one two", 1])
    assert table.render() == lines("text  n", "----  -", "one   1", "two")


def test_short_rows_are_filled():
    table = Table(["a", "b"], missing="?")
    table.add_row(["x"])
    assert table.rows == [["x", "?"]]
    with pytest.raises(ValueError, match="3 values for 2 columns"):
        table.add_row([1, 2, 3])


def test_totals():
    table = table_of(("apple", 10), ("fig", None), ("pear", -3))
    assert table.totals() == [None, 7]


def test_totals_row_in_a_grid():
    table = table_of(("apple", 10), ("fig", 2))
    assert table.render(GRID, totals=True).splitlines()[-4:] == [
        "| fig   |     2 |",
        "+-------+-------+",
        "|       |    12 |",
        "+-------+-------+",
    ]


def test_totals_are_formatted_like_the_column():
    table = Table([Column("amount", decimals=2, thousands=",")])
    table.add_row([-900])
    table.add_row([None])
    table.add_row([-100.5])
    assert table.render(totals=True).splitlines()[2:] == ["  -900.00", "", "  -100.50", "---------", "-1,000.50"]


@pytest.mark.parametrize("reverse", [False, True], ids=["a to z", "z to a [reverse]"])
def test_empty_cells_are_sorted_last(reverse):
    table = table_of(("b", 1), (None, 2), ("a", 3))
    table.sort_by("name", reverse=reverse)
    assert [row[0] for row in table.rows] == (["b", "a", None] if reverse else ["a", "b", None])


def test_sort_by_unknown_column():
    with pytest.raises(KeyError):
        table_of().sort_by("weight")


def test_unknown_style():
    assert get_style("Grid") is GRID
    with pytest.raises(ValueError, match="grid, markdown, plain"):
        get_style("fancy")
