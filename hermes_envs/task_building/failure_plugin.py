"""A plugin of the grading driver that finds, for each test that fails, what a user would see. Standard library alone."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any


class Plugin:
    """A pytest plugin; `findings` holds `code`, `parameters` and `message` of each failing test by node id."""

    def __init__(self) -> None:
        self.findings: dict[str, dict[str, Any]] = {}

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        """Remember the exception that a test of the repository ended with."""
        # What pytest collects outside of the repository, such as the driver's canary, has no path in its node id.
        if not hasattr(node, "function") or node.nodeid.startswith("::"):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        callspec = getattr(node, "callspec", None)
        self.findings[report.nodeid] = {
            "code": _code_up_to_failure(node, call.excinfo),
            "parameters": {} if callspec is None else {name: _safe_repr(value) for name, value in callspec.params.items()},
            "message": _same_everywhere(crash.message if crash is not None else str(report.longrepr))[:4000],
        }


def _safe_repr(value: object) -> str:
    try:
        return _same_everywhere(repr(value))[:300]
    except Exception as error:  # noqa: BLE001 - the code under test is broken on purpose, its __repr__ too
        return f"<{type(value).__name__} whose repr fails with {type(error).__name__}>"


def _same_everywhere(text: str) -> str:
    """The text without the addresses of objects."""
    return re.sub(r"\bat 0x[0-9A-Fa-f]+", "at 0x...", text)


def _code_up_to_failure(node: Any, excinfo: Any) -> str:
    """The lines of the test's function from its first to the end of the failing statement."""
    try:
        lines, first = inspect.getsourcelines(inspect.unwrap(node.function))
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return ""
    for entry in excinfo.traceback:
        # Traceback entries count lines from 0.
        line = entry.lineno + 2 - first
        if str(entry.path) == str(node.path) and 1 <= line <= len(lines):
            return "".join(lines[: _end_of_statement(tree, line)])
    return ""


def _end_of_statement(tree: ast.Module, line: int) -> int:
    """The last line of the innermost statement at a line."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    around = [statement for statement in statements if statement.lineno <= line <= (statement.end_lineno or 0)]
    return max(around, key=lambda statement: statement.lineno).end_lineno or line
