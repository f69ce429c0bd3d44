"""Checks that tasks can be solved and are not solved yet, the way in which they will be used."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hermes_envs.task_building.python_process import run_module

_GROUP_SIZE = 2
_EXPECTED = {"oracle": 1.0, "nop": 0.0}
_SECONDS_PER_TASK = 120.0


@dataclass(frozen=True)
class _Verdict:
    score: float
    reason: str


async def validate(folder: Path, instance_ids: Sequence[str]) -> dict[str, str]:
    """Solve each task of a folder twice with its reference, and twice not at all; says what is wrong with which.

    Runs `python -m hermes_envs.swe_smith process` in a process of its own.

    Raises:
        TaskBuildError: a run did not end.
    """
    problems: dict[str, str] = {}
    for policy, expected in _EXPECTED.items():
        verdicts, ending = await _run(folder, policy, len(instance_ids))
        for instance_id in instance_ids:
            found = verdicts.get(instance_id, [])
            if [verdict.score for verdict in found] != [expected] * _GROUP_SIZE:
                shown = ", ".join(f"{verdict.score:g} ({verdict.reason})" for verdict in found) or f"nothing ({ending})"
                problems.setdefault(instance_id, f"{policy} scores {shown}")
    return problems


async def _run(folder: Path, policy: str, count: int) -> tuple[dict[str, list[_Verdict]], str]:
    """Verdicts by instance id, and the last line that the run wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        groups = Path(scratch) / "groups.jsonl"
        flags = {
            "dataset_name": str(folder),
            "policy": policy,
            "group_size": str(_GROUP_SIZE),
            "total_steps": str(count),
            "data_path_to_save_groups": str(groups),
            "use_wandb": "false",
        }
        arguments = [argument for name, value in flags.items() for argument in (f"--env.{name}", value)]
        command = ("hermes_envs.swe_smith", "process", *arguments)
        _, lines = await run_module(*command, timeout_s=_SECONDS_PER_TASK * (count + 1))
        return _read_verdicts(groups), (lines or ["no output"])[-1][:300]


def _read_verdicts(groups: Path) -> dict[str, list[_Verdict]]:
    verdicts: dict[str, list[_Verdict]] = {}
    if groups.is_file():
        for line in groups.read_text(encoding="utf-8").splitlines():
            group = json.loads(line)
            for score, trajectory in zip(group["scores"], group["overrides"], strict=True):
                verdict = _Verdict(float(score), str(trajectory.get("score_reason", "")))
                verdicts.setdefault(trajectory["instance_id"], []).append(verdict)
    return verdicts
