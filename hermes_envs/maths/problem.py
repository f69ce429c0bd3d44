"""Word problems whose answer is a number."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hermes_envs.errors import DatasetError
from hermes_envs.tasks.task_set import Row, missing_columns

BUNDLED = Path(__file__).parent / "problems.jsonl"
"""Problems that ship with the package, each with a Python expression that gives the answer."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question and the number that answers it. `solution` is a Python expression for it, where `fractions` may be needed."""

    name: str
    question: str
    answer: str
    solution: str | None = None

    @classmethod
    def from_row(cls, name: str, row: Row) -> Problem:
        """Read a row with `question`, `answer` and perhaps `solution`; of GSM8K's answers what comes after `####` counts.

        Raises:
            DatasetError: a column is missing, or the answer is not a number; the message names the row.
        """
        if missing := missing_columns(row, ["question", "answer"]):
            raise DatasetError(f"{name}: column {', '.join(missing)} is missing")
        answer = str(row["answer"]).rpartition("####")[2].strip().replace(",", "").removeprefix("$")
        if not _NUMBER.fullmatch(answer):
            raise DatasetError(f"{name}: its answer is not a number: {answer[:100]!r}")
        solution = row.get("solution")
        return cls(name, str(row["question"]), answer, None if solution is None else str(solution))


def split_problems(problems: Sequence[Problem], eval_ratio: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on, and problems held out: `eval_ratio` of them, chosen by their question and the seed alone.

    The order of the rows does not matter, and a question that occurs twice counts once: none is on both sides.
    """

    def rank(problem: Problem) -> bytes:
        return hashlib.sha256(f"{seed}:{problem.question}".encode()).digest()

    distinct = list({problem.question: problem for problem in reversed(problems)}.values())[::-1]
    held_out = sorted(distinct, key=rank)[: math.ceil(eval_ratio * len(distinct))]
    held_out_questions = {problem.question for problem in held_out}
    return [problem for problem in distinct if problem.question not in held_out_questions], held_out
