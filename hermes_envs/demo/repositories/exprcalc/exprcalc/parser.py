"""From tokens to nodes, by precedence climbing."""

from typing import List

from exprcalc.errors import SyntaxProblem
from exprcalc.nodes import PRECEDENCE, RIGHT_ASSOCIATIVE, Binary, Call, Name, Node, Number, Unary
from exprcalc.tokens import Token, tokenize


class Parser:
    """Parses one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: List[Token] = list(tokenize(text))
        self._index = 0

    @property
    def _current(self) -> Token:
        return self._tokens[self._index]

    def parse(self) -> Node:
        """The whole text as one expression."""
        node = self._expression(0)
        if self._current.kind != "end":
            raise self._problem(f"unexpected {self._current.text!r}")
        return node

    def _expression(self, minimum: int) -> Node:
        """An expression of operators that bind at least as tightly as ``minimum``."""
        left = self._prefix()
        while self._current.kind == "operator":
            operator = self._current.text
            strength = PRECEDENCE.get(operator)
            if strength is None or operator == "not" or strength < minimum:
                break
            self._index += 1
            right = self._expression(strength if operator in RIGHT_ASSOCIATIVE else strength + 1)
            left = Binary(operator, left, right)
        return left

    def _prefix(self) -> Node:
        """A sign or ``not`` and what it applies to, or an atom."""
        if self._accept("-"):
            return Unary("-", self._expression(PRECEDENCE["sign"]))
        if self._accept("+"):
            return self._expression(PRECEDENCE["sign"])
        if self._accept("not"):
            return Unary("not", self._expression(PRECEDENCE["not"]))
        return self._atom()

    def _atom(self) -> Node:
        token = self._current
        if token.kind == "number":
            self._index += 1
            is_whole = token.text.isdigit()
            return Number(int(token.text) if is_whole else float(token.text))
        if token.kind == "name":
            self._index += 1
            if self._accept("("):
                return Call(token.text, tuple(self._arguments()))
            return Name(token.text)
        if self._accept("("):
            node = self._expression(0)
            self._expect(")")
            return node
        raise self._problem("unexpected end" if token.kind == "end" else f"unexpected {token.text!r}")

    def _arguments(self) -> List[Node]:
        """The arguments of a call up to its closing parenthesis."""
        arguments: List[Node] = []
        if self._accept(")"):
            return arguments
        while True:
            arguments.append(self._expression(0))
            if self._accept(")"):
                return arguments
            self._expect(",")

    def _accept(self, text: str) -> bool:
        if self._current.kind == "operator" and self._current.text == text:
            self._index += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._problem(f"expected {text!r}")

    def _problem(self, message: str) -> SyntaxProblem:
        return SyntaxProblem(message, self._text, self._current.position)


def parse(text: str) -> Node:
    """The expression in ``text``.

    Raises:
        SyntaxProblem: there is none, or something follows it.
    """
    return Parser(text).parse()
