"""Runs a repository's whole test suite and reports each test. Executed inside a box by the interpreter of a task's environment.

    python -I -B suite_driver.py REQUEST

`REQUEST` is a JSON file with `root`, `report`, `max_memory_bytes`, and `trace_calls`: whether to report which functions were
called. Standard library and pytest only.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import resource
import sys
import textwrap
import threading
from types import FrameType
from typing import Any


class Reporter:
    """A pytest plugin that remembers what became of each test and, for one that fails, what a user would see."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "missing", "duration_s": 0.0})
        test["duration_s"] += report.duration
        if report.failed or (report.skipped and test["outcome"] != "failed"):
            test["outcome"] = report.outcome
        elif report.when == "call" and test["outcome"] == "missing":
            test["outcome"] = "xpassed" if hasattr(report, "wasxfail") else "passed"

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        if not hasattr(node, "function"):
            return
        test = self.tests.setdefault(report.nodeid, {"outcome": "missing", "duration_s": 0.0})
        crash = getattr(report.longrepr, "reprcrash", None)
        test["message"] = (crash.message if crash is not None else str(report.longrepr))[:4000]
        test["code"] = _code_up_to_failure(node, call.excinfo)
        callspec = getattr(node, "callspec", None)
        if callspec is not None:
            test["parameters"] = {name: _safe_repr(value) for name, value in callspec.params.items()}


def _safe_repr(value: object) -> str:
    try:
        return repr(value)[:300]
    except Exception as error:  # noqa: BLE001 - the code under test is broken on purpose, its __repr__ too
        return f"<{type(value).__name__} whose repr fails with {type(error).__name__}>"


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


class CallTracer:
    """Remembers which functions of the repository were called, by file and first line."""

    def __init__(self, root: str) -> None:
        self._prefix = root + os.sep
        self.called: set[tuple[str, int]] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(self._prefix):
            self.called.add((code.co_filename[len(self._prefix) :], code.co_firstlineno))


def main(request_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    root = request["root"]
    os.chdir(root)
    resource.setrlimit(resource.RLIMIT_AS, (request["max_memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    import pytest

    reporter = Reporter()
    tracer = CallTracer(root)
    if request["trace_calls"]:
        threading.settrace(tracer)
        sys.settrace(tracer)
    options = ["-q", "--color=no", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    status = pytest.main([*options, f"--rootdir={root}"], plugins=[reporter])
    sys.settrace(None)
    report = {"status": int(status), "tests": reporter.tests, "called": sorted(tracer.called)}
    with open(request["report"], "w", encoding="utf-8") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(sys.argv[1])
