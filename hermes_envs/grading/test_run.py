"""Runs tests in a clean slot and says what became of each."""

from __future__ import annotations

import json
import posixpath
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from backends.errors import ArtifactError
from hermes_envs.repositories.python_environment import PYTHON, REPOSITORY
from hermes_envs.workspace import Workspace, explain
from sandbox_image.protocol import WORKSPACE

Outcome = Literal["passed", "failed", "error", "skipped", "xfailed", "xpassed", "missing"]

# As a unittest, which pytest collects whatever names a repository's configuration gives to its tests.
_CANARY = """\
import unittest


class TestCanary(unittest.TestCase):
    def test_canary(self):
        self.fail("a test that must fail")
"""


@dataclass(frozen=True)
class TestRun:
    """Outcomes and durations by node id, or why there are none that could be believed.

    `findings` are what plugins of the run have found, by the plugin's name: data of the code under test, to be validated.
    """

    __test__ = False

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    problem: str | None = None
    duration_s: float = 0.0
    durations_s: dict[str, float] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> set[str]:
        """The tests that passed."""
        return {node_id for node_id, outcome in self.outcomes.items() if outcome == "passed"}

    def failures(self, node_ids: Sequence[str]) -> list[str]:
        """The tests that did not pass; a skipped, missing or uncollected one has not."""
        return [node_id for node_id in node_ids if self.outcomes.get(node_id, "missing") != "passed"]


async def run_tests(
    workspace: Workspace, node_ids: Sequence[str] | None, timeout_s: float, *, plugins: Mapping[str, str] | None = None
) -> TestRun:
    """Run the named tests, or all if None, in the repository of a slot that no agent has used.

    `plugins` are sources of further pytest plugins by name, as driver.py describes them.

    The report lies in a folder whose name is drawn for this run. A test that must fail runs last, and the runner's functions
    are compared before and after: if the one passes or the others changed, nothing of the report is believed. Code that runs
    in the same process can always lie in the end; docs/grading.md says what is left.

    Raises:
        SandboxError: the slot failed.
    """
    folder = f"{WORKSPACE}/.grading-{secrets.token_hex(16)}"
    # Beside the named tests: what their conftest does to them, it does to the canary.
    beside = folder if node_ids is None else posixpath.join(REPOSITORY, posixpath.dirname(_file_of(node_ids[0])))
    canary = f"{beside}/test_{secrets.token_hex(8)}.py"
    report = f"{folder}/{secrets.token_hex(16)}"
    plugin_files = {f"{folder}/plugins/{name}": source for name, source in (plugins or {}).items()}
    request = {
        "root": REPOSITORY,
        "files": sorted({_file_of(node_id) for node_id in node_ids or ()}),
        "node_ids": node_ids,
        "canary": canary,
        "report": report,
        "plugins": list(plugin_files),
    }
    contents = {f"{folder}/driver.py": _driver(), f"{folder}/request": json.dumps(request), canary: _CANARY, **plugin_files}
    for path, content in contents.items():
        written = await workspace.write(path, content.encode())
        if not written.success:
            return TestRun(problem=f"no room to run the tests: {explain(written)}")
    command = f"exec {PYTHON} -I -B {folder}/driver.py {folder}/request"
    result = await workspace.run(command, cwd=REPOSITORY, env={"HOME": "/tmp"}, timeout_s=timeout_s)
    if result.metadata.get("timeout"):
        return TestRun(problem=f"the tests took longer than {timeout_s:g} s")
    try:
        return _believe(json.loads(await workspace.read(report)), float(result.metadata.get("duration_s", 0.0)))
    except ArtifactError:
        ending = " ".join(result.output[-500:].split())
        return TestRun(
            problem=f"the test process ended without a report (exit code {result.metadata.get('exit_code')}): {ending}"
        )
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        return TestRun(problem=f"the report is malformed: {reason!r}")


def _believe(report: dict[str, Any], duration_s: float) -> TestRun:
    if report["replaced"]:
        return TestRun(problem=f"the code under test replaced {report['replaced'][0]}: the test runner was tampered with")
    phases: dict[str, list[dict[str, Any]]] = report["phases"]
    canary = _outcome(phases.pop("canary", []))
    if canary not in ("failed", "error"):
        return TestRun(problem=f"a test that must fail was reported as {canary}: the test runner was tampered with")
    return TestRun(
        outcomes={node_id: _outcome(of_test) for node_id, of_test in phases.items()},
        duration_s=duration_s,
        durations_s={node_id: sum(phase["duration_s"] for phase in of_test) for node_id, of_test in phases.items()},
        findings=dict(report["findings"]),
    )


def _outcome(phases: list[dict[str, Any]]) -> Outcome:
    if any(phase["outcome"] == "failed" for phase in phases):
        return "failed" if any(phase["when"] == "call" and phase["outcome"] == "failed" for phase in phases) else "error"
    expected_failure = any(phase["expected_failure"] for phase in phases)
    if any(phase["outcome"] == "skipped" for phase in phases):
        return "xfailed" if expected_failure else "skipped"
    called = [phase for phase in phases if phase["when"] == "call"]
    if not called:
        return "missing"
    return "xpassed" if expected_failure else "passed"


def _file_of(node_id: str) -> str:
    return node_id.split("::", 1)[0]


@cache
def _driver() -> str:
    return files("hermes_envs.grading").joinpath("driver.py").read_text(encoding="utf-8")
