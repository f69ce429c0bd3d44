from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_envs.errors import RecordingError
from hermes_envs.screen import AsciinemaStreamDecoder

HEADER = {"version": 2, "width": 20, "height": 5, "timestamp": 1, "env": {"TERM": "tmux-256color"}}


def recorded(*events: object, header: object = HEADER) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in (header, *events))


def shown(*output: str) -> AsciinemaStreamDecoder:
    return AsciinemaStreamDecoder.of(recorded(*([0.5, "o", text] for text in output)))


def test_output_is_shown() -> None:
    decoder = AsciinemaStreamDecoder.of(recorded([0.1, "o", "one\r\ntw"], [0.2, "i", "typed"], [0.25, "m", ""], [3, "o", "o"]))
    assert (decoder.text(), decoder.cursor, decoder.size, decoder.time) == ("one\ntwo", (3, 1), (20, 5), 3.0)
    assert decoder.lines == ["one", "two", "", "", ""]
    assert not decoder.alternate


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("漢字 ab\r\n|", "漢字 ab\n|"),
        ("x" * 19 + "漢", "x" * 19 + "\n漢"),
        ("漢字\rx", "x 字"),
        ("漢字\x1b[2Gx", " x字"),
        ("e\u0301 👍🏽 ❤\ufe0f a\u200db", "e\u0301 👍🏽 ❤\ufe0f a\u200db"),
        ("a" * 20 + "b", "a" * 20 + "\nb"),
        ("a" * 20 + "\r\nb", "a" * 20 + "\nb"),
        ("a" * 20 + "\x1b[Kb", "a" * 20 + "\nb"),
        ("one\r\ntwo\x1b[1A\x1b[2Dx", "oxe\ntwo"),
        ("one two\x1b[4D\x1b[Pw\x1b[1@", "onew wo"),
        ("1\r\n2\r\n3\x1b[2;1H\x1b[L\x1b[1;1H\x1b[M", "\n2\n3"),
        ("1\r\n2\r\n3\r\n4\r\n5\x1b[2;4r\x1b[2;1H\x1bM*", "1\n*\n2\n3\n5"),
        ("1\r\n2\r\n3\r\n4\r\n5\x1b[2;4r\x1b[4;1H\n*\x1b[r", "1\n3\n4\n*\n5"),
        ("1\r\n2\x1b[S", "2"),
        ("1\r\n2\x1b[T", "\n1\n2"),
        ("ab\x1b[3b", "abbbb"),
        ("a\tb\x1b[2Z*", "*       b"),
        ("\x1b(0lqk\x1b(B l", "┌─┐ l"),
        ("a\x1b7\x1b[3;3Hb\x1b8c\x1b8d", "ad\n\n  b"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\x1bPq#0\x1b\\c\x1b_x\x1b\\d", "abcd"),
        ("\x1b[>4;2m\x1b[?4m\x1b[?1;2c\x1b[=1c\x1b[22;0;0t\x1b[1 q\x1b[?2004h\x1b=\x1b[!pa", "a"),
        ("\x1b[38:2::1:2:3mcolour\x1b[48;5;7m!\x1b[999m", "colour!"),
        ("gone\x1b[2J\x1b[Hnew", "new"),
        ("kept\x1b[3J", "kept"),
        ("main\x1b[?1049h\x1b[Hfull screen\x1b[?1049l.", "main."),
        ("main\x1b[?1049h\x1b[Hfull screen", "full screen"),
        ("a\x1bcb", "b"),
        ("\x1b#8\x1b[2J-", "-"),
        ("a\x1b[9999999999999999999999Cb", "a" + " " * 18 + "b"),
        ("broken \x1b[12\x00m \x1b\x01 end", "broken m  end"),
    ],
)
def test_sequences(output: str, text: str) -> None:
    assert shown(output).text() == text
    assert shown(*output).text() == text, "cut at each character"


def test_lines_that_scrolled_off_are_history() -> None:
    decoder = shown("".join(f"{number}\r\n" for number in range(1, 9)))
    assert (decoder.history, decoder.lines) == (["1", "2", "3", "4"], ["5", "6", "7", "8", ""])
    assert decoder.text(with_history=True) == "\n".join(map(str, range(1, 9)))
    assert shown("\x1b[?1049h" + "\n" * 10).history == []


def test_resizing() -> None:
    lines = [0.1, "o", "".join(f"line {number}\r\n" for number in range(1, 5)) + "end"]
    smaller = AsciinemaStreamDecoder.of(recorded(lines, [0.2, "r", "10x3"]))
    assert (smaller.size, smaller.lines) == ((10, 3), ["line 3", "line 4", "end"])
    larger = AsciinemaStreamDecoder.of(recorded(lines, [0.2, "r", "10x3"], [0.3, "r", "30x6"], [0.4, "o", "\r\n" + "x" * 25]))
    assert larger.lines == ["line 1", "line 2", "line 3", "line 4", "end", "x" * 25]
    full = AsciinemaStreamDecoder.of(
        recorded(lines, [0.2, "o", "\x1b[?1049h\x1b[Hx"], [0.3, "r", "20x3"], [0.4, "o", "\x1b[?1049l."])
    )
    assert full.lines == ["line 3", "line 4", "end."]


@settings(max_examples=50, deadline=None, database=None)
@given(st.data())
def test_a_recording_may_be_cut_anywhere(data: st.DataObject) -> None:
    events = data.draw(st.lists(st.text("ab漢\x1b[?1049hlmHJKr;234\r\n\t\b😀", max_size=12), max_size=8))
    text = recorded(*([number, "o", output] for number, output in enumerate(events)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = AsciinemaStreamDecoder()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces.feed(text[start:end])
    whole = AsciinemaStreamDecoder.of(text)
    assert (pieces.lines, pieces.cursor, pieces.history) == (whole.lines, whole.cursor, whole.history)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.text(max_size=40) | st.from_regex(r"\A\x1b[\[\]()#P7-8A-Za-z0-9;:?>!$ ]{0,12}\Z"), max_size=10))
def test_whatever_was_printed_is_shown(output: list[str]) -> None:
    decoder = shown(*output)
    assert len(decoder.lines) == 5
    x, y = decoder.cursor
    assert 0 <= x < 20
    assert 0 <= y < 5


@pytest.mark.parametrize(
    ("recording", "words"),
    [
        ("no json\n", "line 1: not JSON"),
        ("[]\n", "line 1: not a header"),
        (recorded(header=HEADER | {"version": 1}), "line 1: only version 2"),
        (recorded(header=HEADER | {"width": 0}), "line 1: not a size"),
        (recorded(header=HEADER | {"height": "5.5"}), "line 1: not a size"),
        (recorded(header=HEADER | {"width": 10**9}), "line 1: not a size"),
        (recorded(header={"version": 2}), "line 1: not a size"),
        (recorded([1, "o", "x"], [2, "o"]), "line 3: not an event"),
        (recorded([True, "o", "x"]), "line 2: not an event"),
        (recorded([-1, "o", "x"]), "line 2: not an event"),
        (recorded(["1", "o", "x"]), "line 2: not an event"),
        (recorded([1, "r", "80"]), "line 2: not a size"),
        (recorded([1, "r", "80x0"]), "line 2: not a size"),
        (recorded({"event": "o"}), "line 2: not an event"),
        (recorded([1, "o", "x"])[:-5], "line 2: not JSON"),
        (recorded() + "[" * 100_000, "line 2: not JSON"),
    ],
)
def test_what_is_wrong_with_a_recording_is_said(recording: str, words: str) -> None:
    with pytest.raises(RecordingError, match=words) as error:
        AsciinemaStreamDecoder.of(recording)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_bad_line_takes_no_other_with_it() -> None:
    decoder = AsciinemaStreamDecoder()
    with pytest.raises(RecordingError, match="line 3"):
        decoder.feed(recorded([1, "o", "one "], "bad", [2, "o", "two"]))
    assert decoder.text() == "one two"


def test_nothing_is_shown_before_the_header() -> None:
    decoder = AsciinemaStreamDecoder()
    decoder.feed('{"version": 2, "wid')
    with pytest.raises(RecordingError, match="no header yet"):
        decoder.text()
    with pytest.raises(RecordingError, match="no header yet"):
        decoder.feed_event([1, "o", "x"])
    decoder.feed('th": 4, "height": 2}\n')
    decoder.feed_event([1, "o", "x"])
    assert decoder.lines == ["x", ""]
