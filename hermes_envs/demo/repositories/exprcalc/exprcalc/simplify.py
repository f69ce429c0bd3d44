"""Making expressions smaller without changing their value."""

from typing import Set

from exprcalc.errors import EvaluationError
from exprcalc.evaluator import Evaluator
from exprcalc.functions import CONSTANTS
from exprcalc.nodes import Binary, Call, Name, Node, Number, Unary

ZERO, ONE = Number(0), Number(1)


def variables_of(node: Node) -> Set[str]:
    """The names in an expression that have to be given a value."""
    if isinstance(node, Name):
        return set() if node.name in CONSTANTS else {node.name}
    if isinstance(node, Unary):
        return variables_of(node.operand)
    if isinstance(node, Binary):
        return variables_of(node.left) | variables_of(node.right)
    if isinstance(node, Call):
        return set().union(*(variables_of(argument) for argument in node.arguments))
    return set()


def simplify(node: Node) -> Node:
    """Compute what is constant and drop what has no effect: ``x + 0``, ``1 * x``, ``x ^ 1``, ``--x``.

    What has no value, such as ``1 / 0``, stays as it is.
    """
    if isinstance(node, Unary):
        operand = simplify(node.operand)
        if node.operator == "-" and isinstance(operand, Unary) and operand.operator == "-":
            return operand.operand
        return _folded(Unary(node.operator, operand))
    if isinstance(node, Call):
        return Call(node.function, tuple(simplify(argument) for argument in node.arguments))
    if isinstance(node, Binary):
        return _neutral(_folded(Binary(node.operator, simplify(node.left), simplify(node.right))))
    return node


def _folded(node: Node) -> Node:
    """The number that an expression of numbers comes to."""
    operands = (node.left, node.right) if isinstance(node, Binary) else (node.operand,)
    if not all(isinstance(operand, Number) for operand in operands):
        return node
    try:
        value = Evaluator({}).value(node)
    except EvaluationError:
        return node
    return node if isinstance(value, bool) else Number(value)


def _neutral(node: Node) -> Node:
    """The operand that is left when the other one has no effect."""
    if not isinstance(node, Binary):
        return node
    if node.operator == "+" and node.left == ZERO:
        return node.right
    if node.operator in ("+", "-") and node.right == ZERO:
        return node.left
    if node.operator == "*" and node.left == ONE:
        return node.right
    if node.operator in ("*", "/", "^") and node.right == ONE:
        return node.left
    return node
