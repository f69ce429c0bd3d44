"""The parts of an expression."""

from dataclasses import dataclass
from typing import Tuple, Union


@dataclass(frozen=True)
class Number:
    value: Union[int, float]


@dataclass(frozen=True)
class Name:
    name: str


@dataclass(frozen=True)
class Unary:
    """``-`` or ``not``."""

    operator: str
    operand: "Node"


@dataclass(frozen=True)
class Binary:
    """Any operator between two expressions."""

    operator: str
    left: "Node"
    right: "Node"


@dataclass(frozen=True)
class Call:
    function: str
    arguments: Tuple["Node", ...]


Node = Union[Number, Name, Unary, Binary, Call]

PRECEDENCE = {
    "or": 1,
    "and": 2,
    "not": 3,
    "<": 4,
    "<=": 4,
    ">": 4,
    ">=": 4,
    "==": 4,
    "!=": 4,
    "+": 5,
    "-": 5,
    "*": 6,
    "/": 6,
    "//": 6,
    "%": 6,
    "sign": 7,
    "^": 8,
}
"""How tightly operators bind; ``sign`` is the minus before an operand."""

RIGHT_ASSOCIATIVE = frozenset({"^"})
