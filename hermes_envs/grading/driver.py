"""Runs tests with pytest and reports each of them. Executed inside a sandbox by the task's own interpreter.

    python -I -B driver.py REQUEST

`REQUEST` is a JSON file with `root`, `files`, `node_ids`, `canary`, `report` and `plugins`. Without `node_ids` all tests of the
repository run. The report is written only after pytest has ended by itself: code that ends the process leaves none. Standard
library and pytest only.

Each of `plugins` is the path of a Python file with a class `Plugin`: a pytest plugin whose attribute `findings`, a JSON value,
becomes part of the report.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

RUNNER_PACKAGES = ("pytest", "_pytest", "pluggy", "unittest")


class Reporter:
    """A pytest plugin that keeps the requested tests alone, adds the canary and remembers every phase of each.

    Without `node_ids` every test is requested. `canary` is the path of a file whose test runs last.
    """

    def __init__(self, node_ids: list[str] | None, canary: str) -> None:
        self.wanted = None if node_ids is None else set(node_ids)
        self.canary = canary
        self.canary_ids: set[str] = set()
        self.phases: dict[str, list[dict[str, Any]]] = {}
        self.untouched: dict[str, tuple[Any, Any]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self) -> None:
        """Look at the runner after its plugins, which may rightly change it, and before any code of the repository."""
        self.untouched = runner_functions()

    def pytest_configure(self, config: Any) -> None:
        """Add the canary to the files that were named, or else to what the repository's configuration names."""
        config.args.append(self.canary)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out the tests that nobody asked for."""
        self.canary_ids = {item.nodeid for item in items if item.path.name == os.path.basename(self.canary)}
        if self.wanted is None:
            return
        requested = self.wanted | self.canary_ids
        kept: list[Any] = []
        dropped: list[Any] = []
        for item in items:
            (kept if item.nodeid in requested else dropped).append(item)
        items[:] = kept
        if dropped:
            config.hook.pytest_deselected(items=dropped)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Remember how one phase of a test ended."""
        phase = {
            "when": report.when,
            "outcome": report.outcome,
            "expected_failure": hasattr(report, "wasxfail"),
            "duration_s": report.duration,
        }
        self.phases.setdefault("canary" if report.nodeid in self.canary_ids else report.nodeid, []).append(phase)


def runner_functions() -> dict[str, tuple[Any, Any]]:
    """Every function of the test runner with its code, by name; whoever keeps the result keeps them from being recycled."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".", 1)[0] not in RUNNER_PACKAGES:
            continue
        for name, value in list(vars(module).items()):
            for inner, function in _functions(value):
                found[f"{module_name}.{name}{inner}"] = (function, function.__code__)
    return found


def _functions(value: Any) -> Iterator[tuple[str, types.FunctionType]]:
    if isinstance(value, types.FunctionType):
        yield "", value
    elif isinstance(value, type) and value.__module__.split(".", 1)[0] in RUNNER_PACKAGES:
        for name, member in list(vars(value).items()):
            function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
            if isinstance(function, types.FunctionType):
                yield f".{name}", function


def replaced_functions(before: dict[str, tuple[Any, Any]]) -> list[str]:
    """The functions of the test runner that are others than before."""
    now = runner_functions()
    return sorted(name for name, (function, code) in before.items() if now.get(name) != (function, code))


def main(request_path: str) -> None:
    """Run the request and write its report."""
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    # What tests are asked for, and where the answer goes, is not left for the code under test to find.
    os.unlink(request_path)
    os.chdir(request["root"])

    reporter = Reporter(request["node_ids"], request["canary"])
    plugins = {os.path.basename(path): runpy.run_path(path)["Plugin"]() for path in request["plugins"]}
    options = ["-q", "--color=no", "-p", "no:cacheprovider", f"--rootdir={request['root']}", "--continue-on-collection-errors"]
    status = pytest.main([*options, *request["files"]], plugins=[reporter, *plugins.values()])
    report = {
        "status": int(status),
        "phases": reporter.phases,
        "replaced": replaced_functions(reporter.untouched),
        "findings": {name: plugin.findings for name, plugin in plugins.items()},
    }
    with open(request["report"], "w", encoding="utf-8") as file:
        json.dump(report, file)
        file.flush()
        os.fsync(file.fileno())
    # What the code under test has registered for the end of the process does not get to run.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
