"""Arithmetic and logic as text, evaluated safely."""

from typing import Any, Mapping, Optional

from exprcalc.errors import EvaluationError, ExpressionError, SyntaxProblem
from exprcalc.evaluator import Evaluator
from exprcalc.formatter import to_text
from exprcalc.parser import parse
from exprcalc.simplify import simplify, variables_of

__all__ = [
    "EvaluationError",
    "Evaluator",
    "ExpressionError",
    "SyntaxProblem",
    "evaluate",
    "parse",
    "simplify",
    "to_text",
    "variables_of",
]


def evaluate(text: str, variables: Optional[Mapping[str, Any]] = None) -> Any:
    """The value of an expression.

    Raises:
        SyntaxProblem: the text is no expression; its ``position`` says where.
        EvaluationError: an unknown name, a wrong count of arguments, or arithmetic without a result.
    """
    return Evaluator(variables or {}).value(parse(text))
