import pytest

from tabletext import parse_csv, to_csv
from tabletext.delimited import split_line


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("a,b,c", ["a", "b", "c"]),
        ("1, 2.5 ,x", [1, 2.5, "x"]),
        ("a,,c", ["a", None, "c"]),
        ("a,", ["a", None]),
        ('"1",2', ["1", 2]),
        ('"a, b",c', ["a, b", "c"]),
        ('"say ""hi""",[x]', ['say "hi"', "[x]"]),
    ],
)
def test_split_line(line, values):
    assert split_line(line) == values


def test_unclosed_quote():
    with pytest.raises(ValueError, match="unclosed"):
        split_line('a,"b')


def test_parse():
    table = parse_csv("name;n\n\nfig;2\n", delimiter=";")
    assert [column.title for column in table.columns] == ["name", "n"]
    assert table.rows == [["fig", 2]]
    with pytest.raises(ValueError, match="no heading"):
        parse_csv("\n")


def test_round_trip():
    text = 'name,note,n\nfig,"1",2\n"a, b","say ""hi""",\n'
    assert to_csv(parse_csv(text)) == text
