"""Writes the report that a user might file about a bug, from what the failing tests show."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from hermes_envs.repositories.python_environment import REPOSITORY
from hermes_envs.task_building.mutation import FunctionInfo
from hermes_envs.task_building.suite_runner import Failure

_SHOWN_EXAMPLES = 3
_MAX_CODE_LINES = 15
_MAX_MESSAGE_LINES = 12
_EXCEPTION = re.compile(r"([A-Za-z_][\w.]*(?:Error|Exception|Invalid|Warning))\b")


def write_problem_statement(functions: Sequence[FunctionInfo], failures: Mapping[str, Failure]) -> str:
    """A short report: which functions misbehave, what they promise, what was done and what came of it.

    `failures` are those of the failing tests, by node id. The report names neither a test nor what would fix the bug.
    """
    hidden = _test_names(failures)
    examples = _distinct(failures.values())
    parts = [f"# {_title(functions, examples)}"]
    parts += [_promise(function) for function in functions]
    shown = examples[:_SHOWN_EXAMPLES]
    parts += [_example(failure, hidden) for failure in shown]
    if len(examples) > len(shown):
        parts.append(f"That is not all: {len(examples) - len(shown)} more of my examples fail in other ways.")
    return "\n\n".join(parts) + "\n"


def _title(functions: Sequence[FunctionInfo], examples: Sequence[Failure]) -> str:
    names = " and ".join(f"`{function.qualified_name}`" for function in functions)
    errors = {_exception(failure) for failure in examples}
    if len(errors) == 1 and (error := errors.pop()) is not None:
        return f"Unexpected {error} in connection with {names}"
    return f"Wrong results in connection with {names}"


def _exception(failure: Failure) -> str | None:
    """The type of the exception that the code ended with, unless it is a comparison that did not hold."""
    match = _EXCEPTION.match(failure.message)
    return None if match is None or match[1] == "AssertionError" else match[1].rpartition(".")[2]


def _promise(function: FunctionInfo) -> str:
    where = f"`{function.dotted_name}` (`{function.signature}`)"
    if not function.documentation:
        return f"{where} does not behave as it should."
    return f"{where} does not do what its documentation says:\n\n{textwrap.indent(function.documentation, '> ')}"


def _distinct(failures: Iterable[Failure]) -> list[Failure]:
    """One failure for each way to fail, those that are told in few words first."""

    def length(failure: Failure) -> tuple[int, str, str]:
        return len(failure.code) + len(failure.message), failure.code, failure.message

    found: dict[str, Failure] = {}
    for failure in sorted(failures, key=length):
        if failure.message:
            found.setdefault(failure.message.split("\n", 1)[0], failure)
    return list(found.values())


def _example(failure: Failure, hidden: re.Pattern[str] | None) -> str:
    code = _reproduction(failure.code)
    parameters = "".join(f"{name} = {value}\n" for name, value in failure.parameters.items() if re.search(rf"\b{name}\b", code))
    lines = failure.message.splitlines()
    message = "\n".join(lines[:_MAX_MESSAGE_LINES] + (["..."] if len(lines) > _MAX_MESSAGE_LINES else []))
    text = f"```python\n{parameters}{code}\n```\n\nThis ends with:\n\n```\n{message}\n```" if code else f"```\n{message}\n```"
    text = text.replace(f"{REPOSITORY}/", "")
    return text if hidden is None else hidden.sub("example", text)


def _reproduction(code: str) -> str:
    """The body of a function whose last lines may be missing, without its documentation."""
    lines = textwrap.dedent(code).splitlines()
    try:
        function = ast.parse("\n".join(lines)).body[0]
    except (SyntaxError, IndexError):
        return lines[-1].strip() if lines else ""
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return lines[-1].strip()
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body or body[0].lineno == function.lineno:
        return lines[-1].strip()
    kept = lines[body[0].lineno - 1 :]
    if len(kept) > _MAX_CODE_LINES:
        kept = ["    # ...", *kept[-_MAX_CODE_LINES:]]
    return textwrap.dedent("\n".join(kept))


def _test_names(node_ids: Iterable[str]) -> re.Pattern[str] | None:
    """What tests are called: their functions, classes and modules."""
    names: set[str] = set()
    for node_id in node_ids:
        path, *parts = node_id.split("[", 1)[0].split("::")
        names |= {*parts, path.rpartition("/")[2].removesuffix(".py")}
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
    return re.compile(rf"\b(?:{alternatives})\b") if alternatives else None
