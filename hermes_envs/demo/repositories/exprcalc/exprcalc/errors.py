"""What can be wrong with an expression."""


class ExpressionError(ValueError):
    """Base of all errors of this package."""


class SyntaxProblem(ExpressionError):
    """The text is no expression. ``position`` counts characters from 0."""

    def __init__(self, message: str, text: str, position: int) -> None:
        super().__init__(f"{message} at {position}")
        self.text = text
        self.position = position

    def pointer(self) -> str:
        """Two lines: the text, and a caret below the problem."""
        return f"{self.text}\n{' ' * self.position}^"


class EvaluationError(ExpressionError):
    """The expression has no value."""
