"""From nodes to values."""

import operator
from typing import Any, Callable, Dict, Mapping

from exprcalc.errors import EvaluationError
from exprcalc.functions import CONSTANTS, FUNCTIONS
from exprcalc.nodes import Binary, Call, Name, Node, Number, Unary

MAX_EXPONENT = 10_000

_OPERATIONS: Dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


class Evaluator:
    """Computes expressions over fixed variables. A variable hides a constant of the same name."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._variables = variables

    def value(self, node: Node) -> Any:
        """The value of an expression.

        Raises:
            EvaluationError: it has none; the message says why.
        """
        if isinstance(node, Number):
            return node.value
        if isinstance(node, Name):
            return self._lookup(node.name)
        if isinstance(node, Unary):
            operand = self.value(node.operand)
            return not operand if node.operator == "not" else -operand
        if isinstance(node, Call):
            return self._call(node)
        return self._binary(node)

    def _lookup(self, name: str) -> Any:
        if name in self._variables:
            return self._variables[name]
        if name in CONSTANTS:
            return CONSTANTS[name]
        raise EvaluationError(f"unknown name {name!r}")

    def _call(self, node: Call) -> Any:
        if node.function == "if":
            return self._choose(node)
        function = FUNCTIONS.get(node.function)
        if function is None:
            raise EvaluationError(f"unknown function {node.function!r}")
        return function([self.value(argument) for argument in node.arguments])

    def _choose(self, node: Call) -> Any:
        """``if(condition, yes, no)``: only the chosen argument is evaluated."""
        if len(node.arguments) != 3:
            raise EvaluationError(f"if takes 3 arguments, not {len(node.arguments)}")
        condition, yes, no = node.arguments
        return self.value(yes) if self.value(condition) else self.value(no)

    def _binary(self, node: Binary) -> Any:
        left = self.value(node.left)
        if node.operator == "and":
            return left and self.value(node.right)
        if node.operator == "or":
            return left or self.value(node.right)
        right = self.value(node.right)
        if node.operator == "^":
            return self._power(left, right)
        try:
            return _OPERATIONS[node.operator](left, right)
        except ZeroDivisionError:
            raise EvaluationError("division by zero") from None

    @staticmethod
    def _power(base: Any, exponent: Any) -> Any:
        """A bounded power: huge exponents would take for ever."""
        if abs(exponent) > MAX_EXPONENT:
            raise EvaluationError(f"the exponent {exponent} is larger than {MAX_EXPONENT}")
        try:
            result = base**exponent
        except (ZeroDivisionError, OverflowError):
            raise EvaluationError(f"{base} ^ {exponent} has no value") from None
        if isinstance(result, complex):
            raise EvaluationError(f"{base} ^ {exponent} has no real value")
        return result
