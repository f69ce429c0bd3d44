"""What a terminal shows after some output: the sequences that programs send, and what they do to the screen."""

from __future__ import annotations

import re

from pyte import modes
from pyte.screens import Margins

from hermes_envs.screen.grid import ScreenGrid

_SEQUENCE = re.compile(
    r"\x1b(?:"
    r"\[(?P<private>[<=>?]?)(?P<parameters>[0-9:;]*)(?P<intermediate>[ -/]*)(?P<final>[@-~])"
    r"|(?P<string>[]PX^_k])(?P<payload>[^\x07\x18\x1a\x1b]*)(?:\x07|\x1b\\|[\x18\x1a])"
    r"|(?P<designate>[ -/]+)(?P<set>[0-~])"
    r"|(?P<plain>[0-OQ-WYZ\\`-jl-~])"
    r")"
)
_BEGUN = re.compile(r"\x1b(?:\[[<=>?]?[0-9:;]*[ -/]*|[]PX^_k][^\x07\x18\x1a\x1b]*\x1b?|[ -/]*)\Z")
_INTRODUCER = re.compile(r"\x1b\[[0-?]*[ -/]*")
_TEXT = re.compile(r"[^\x00-\x1f\x7f]+")
_LONGEST_SEQUENCE = 1 << 20
_ALTERNATE_SCREEN = (47, 1047, 1049)
_ONLY_CURSOR = 1048
_WITH_CURSOR = (_ONLY_CURSOR, 1049)


class TerminalScreen(ScreenGrid):
    """A screen of `columns` x `lines` cells that obeys control sequences."""

    def __init__(self, columns: int, lines: int) -> None:
        self._pending = ""
        super().__init__(columns, lines)

    def feed(self, output: str) -> None:
        """Show what a program printed; it may be cut anywhere, within a sequence as well."""
        output, offset = self._pending + output, 0
        self._pending = ""
        while offset < len(output):
            text = _TEXT.match(output, offset)
            if text is not None:
                self.draw(text.group())
                offset = text.end()
            elif output[offset] != "\x1b":
                self._control(output[offset])
                offset += 1
            elif (sequence := _SEQUENCE.match(output, offset)) is not None:
                self._obey(sequence)
                offset = sequence.end()
            elif _BEGUN.match(output, offset) and len(output) - offset < _LONGEST_SEQUENCE:
                self._pending = output[offset:]
                return
            else:
                # Something else has cut it short.
                broken = _INTRODUCER.match(output, offset)
                offset = offset + 1 if broken is None else broken.end()

    def _control(self, character: str) -> None:
        match character:
            case "\b":
                self.cursor.x = max(self.cursor.x - 1, 0)
            case "\t":
                self.tab()
            case "\n" | "\v" | "\f":
                self.linefeed()
            case "\r":
                self.carriage_return()
            case "\x0e":
                self.shift_out()
            case "\x0f":
                self.shift_in()

    def _obey(self, sequence: re.Match[str]) -> None:
        if (final := sequence["final"]) is not None:
            if not sequence["intermediate"]:
                parameters = [min(int(part or 0), 9999) for part in re.split("[:;]", sequence["parameters"])]
                self._obey_csi(sequence["private"], final, parameters)
            elif sequence["intermediate"] == "!" and final == "p":
                self._soft_reset()
        elif (designate := sequence["designate"]) is not None:
            if designate == "#" and sequence["set"] == "8":
                self.alignment_display()
            elif designate in ("(", ")"):
                self.define_charset(sequence["set"], mode=designate)
        elif (plain := sequence["plain"]) is not None:
            self._obey_plain(plain)
        elif sequence["string"] == "]" and sequence["payload"][:2] in ("0;", "2;"):
            self.set_title(sequence["payload"][2:])

    def _obey_plain(self, final: str) -> None:
        match final:
            case "7":
                self.save_cursor()
            case "8":
                self.restore_cursor()
            case "c":
                self.reset()
            case "D":
                self.index()
            case "E":
                self.carriage_return()
                self.linefeed()
            case "H":
                self.set_tab_stop()
            case "M":
                self.reverse_index()

    def _obey_csi(self, private: str, final: str, parameters: list[int]) -> None:
        if private:
            if private == "?" and final in "hl":
                self._switch(parameters, on=final == "h")
            elif private == "?" and final in "JK":
                (self.erase_in_display if final == "J" else self.erase_in_line)(parameters[0])
            return
        if final in "hl":
            (self.set_mode if final == "h" else self.reset_mode)(*parameters)
        elif final == "m":
            self.select_graphic_rendition(*parameters)
        elif final in "Hf":
            self.cursor_position(*[*parameters, 0][:2])
        elif final == "r":
            self._scroll_within(*[*parameters, 0][:2])
        elif final in _ACTIONS:
            getattr(self, _ACTIONS[final])(parameters[0])

    def _switch(self, numbers: list[int], *, on: bool) -> None:
        for number in numbers:
            if number in _WITH_CURSOR and on:
                self.save_cursor()
            if number in _ALTERNATE_SCREEN:
                self.show_alternate(on, with_cursor=number in _WITH_CURSOR)
            elif number == 3:
                # Programs that would like 132 columns do not get them here, only the empty screen that goes with it.
                self.erase_in_display(2)
                self.cursor_position()
            else:
                (self.set_mode if on else self.reset_mode)(number, private=True)
            if number == _ONLY_CURSOR and not on:
                self.restore_cursor()

    def _scroll_within(self, top: int, bottom: int) -> None:
        top, bottom = max(top, 1), min(bottom or self.lines, self.lines)
        if top < bottom:
            self.margins = None if (top, bottom) == (1, self.lines) else Margins(top - 1, bottom - 1)
            self.cursor_position()

    def _soft_reset(self) -> None:
        self.margins, self._saved = None, None
        self.reset_mode(modes.IRM)
        self.reset_mode(6, private=True)
        self.set_mode(7, 25, private=True)
        self.select_graphic_rendition(0)


_ACTIONS = {
    "@": "insert_characters",
    "A": "cursor_up",
    "B": "cursor_down",
    "C": "cursor_forward",
    "D": "cursor_back",
    "E": "cursor_down1",
    "F": "cursor_up1",
    "G": "cursor_to_column",
    "I": "next_tabs",
    "J": "erase_in_display",
    "K": "erase_in_line",
    "L": "insert_lines",
    "M": "delete_lines",
    "P": "delete_characters",
    "S": "scroll_up",
    "T": "scroll_down",
    "X": "erase_characters",
    "Z": "previous_tabs",
    "`": "cursor_to_column",
    "a": "cursor_forward",
    "b": "repeat",
    "d": "cursor_to_line",
    "e": "cursor_down",
    "g": "clear_tab_stop",
    "s": "save_cursor_at",
    "u": "restore_cursor",
}
"""Control sequences with one number, by their last character, and the method that obeys them."""
