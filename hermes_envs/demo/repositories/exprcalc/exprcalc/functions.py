"""The functions that an expression may call."""

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Sequence

from exprcalc.errors import EvaluationError


@dataclass(frozen=True)
class Function:
    """A function and how many arguments it takes; ``most`` is None for any number."""

    name: str
    call: Callable[..., Any]
    least: int
    most: Optional[int]

    def __call__(self, arguments: Sequence[Any]) -> Any:
        """Apply it.

        Raises:
            EvaluationError: a wrong count of arguments, or no result for these.
        """
        count = len(arguments)
        if count < self.least or (self.most is not None and count > self.most):
            raise EvaluationError(f"{self.name} takes {self._wanted()}, not {count}")
        try:
            return self.call(*arguments)
        except (ValueError, OverflowError) as error:
            raise EvaluationError(f"{self.name}: {error}") from error

    def _wanted(self) -> str:
        if self.most is None:
            return f"at least {self.least} arguments"
        if self.least == self.most:
            return "1 argument" if self.least == 1 else f"{self.least} arguments"
        return f"{self.least} to {self.most} arguments"


def _clamp(value: Any, low: Any, high: Any) -> Any:
    if high < low:
        raise ValueError("the upper bound is below the lower")
    return max(low, min(value, high))


def _average(*values: Any) -> float:
    return math.fsum(values) / len(values)


def _round(value: Any, digits: int = 0) -> Any:
    """Halves are rounded away from zero, as people do, and not to even."""
    scale = 10**digits
    rounded = math.floor(abs(value) * scale + 0.5) / scale
    rounded = math.copysign(rounded, value)
    return rounded if digits > 0 else int(rounded)


FUNCTIONS: Dict[str, Function] = {
    function.name: function
    for function in (
        Function("abs", abs, 1, 1),
        Function("sqrt", math.sqrt, 1, 1),
        Function("log", math.log, 1, 2),
        Function("round", _round, 1, 2),
        Function("clamp", _clamp, 3, 3),
        Function("min", lambda *values: min(values), 1, None),
        Function("max", lambda *values: max(values), 1, None),
        Function("average", _average, 1, None),
    )
}

CONSTANTS: Dict[str, Any] = {"pi": math.pi, "e": math.e, "true": True, "false": False}
