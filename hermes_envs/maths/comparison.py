"""Decides whether an answer equals a number: the program of `AnswerChecker`'s process.

Reads lines of JSON `[gold, answer]` and writes for each a line with the reason why the answer is wrong, or null.

math-verify parses and simplifies whatever a model wrote. That can take for ever, in C code that no signal handler interrupts,
and all memory. So the kernel ends this process when one comparison has used `CPU_SECONDS`; waiting for a CPU does not count.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Equality, Expr

CPU_SECONDS = 2.0
MEMORY_BYTES = 2 << 30


def difference(gold: str, answer: str) -> str | None:
    """Why the answer is not the number `gold`; None if it is.

    One value is an answer; a list, a set, an interval, a relation or an unknown is none, whatever it contains. Signs of
    currency and percent are units, as the data set's answers have none, and `x = 5` means 5.
    """
    plain = answer.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "").rstrip(" .")
    # Of a chain of equations the parser takes the last part.
    values = [] if plain.count("=") > 1 else _parse(plain)
    if len(values) != 1:
        return "the answer cannot be read as one value"
    [value] = values
    if isinstance(value, Equality) and value.lhs.is_Symbol:
        value = value.rhs
    # What is written as text, such as \text{5}, is a symbol, and compared by its name.
    if not isinstance(value, Expr) or (value.free_symbols and not value.is_Symbol):
        return "the answer is not one number"
    return None if verify(_parse(gold), [value], timeout_seconds=None) else "the answer is another number"


def _parse(latex: str) -> list[object]:
    # First match, and no text when parsing fails: there is one candidate, and it is an expression.
    boxed = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    values: list[object] = parse(
        f"\\boxed{{{latex}}}", [boxed], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
    )
    return values


def main() -> None:
    """Compare what standard input asks, until it ends."""
    # Its warning that there is no timeout; there is one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            wrong = difference(gold, answer)
        except (MemoryError, RecursionError):
            wrong = "the answer is too large to be compared"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(wrong) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
