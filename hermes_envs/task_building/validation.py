"""Checks that tasks can be solved and are not solved yet, the way in which they will be used."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hermes_envs.errors import TaskBuildError

_GROUP_SIZE = 2
_EXPECTED = {"oracle": 1.0, "nop": 0.0}
_SECONDS_PER_TASK = 120.0


async def validate(folder: Path, instance_ids: Sequence[str]) -> dict[str, str]:
    """Solve each task of a folder twice with its reference, and twice not at all; says what is wrong with which.

    Runs `python -m hermes_envs.swe_smith process` in a process of its own.

    Raises:
        TaskBuildError: a run did not end.
    """
    problems: dict[str, str] = {}
    for policy, expected in _EXPECTED.items():
        scores, ending = await _run(folder, policy, len(instance_ids))
        for instance_id in instance_ids:
            observed = scores.get(instance_id, [])
            if observed != [expected] * _GROUP_SIZE:
                shown = ", ".join(f"{score:g}" for score in observed) or f"nothing ({ending})"
                problems.setdefault(instance_id, f"{policy} scores {shown}")
    return problems


async def _run(folder: Path, policy: str, count: int) -> tuple[dict[str, list[float]], str]:
    """Scores by instance id, and the last line that the run wrote."""
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
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hermes_envs.swe_smith",
            "process",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _SECONDS_PER_TASK * (count + 1))
        except TimeoutError:
            raise TaskBuildError(f"validation with policy {policy} did not end in time") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        lines = output.decode(errors="replace").strip().splitlines() or ["no output"]
        return _read_scores(groups), lines[-1].strip()[:300]


def _read_scores(groups: Path) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    if groups.is_file():
        for line in groups.read_text(encoding="utf-8").splitlines():
            group = json.loads(line)
            for score, trajectory in zip(group["scores"], group["overrides"], strict=True):
                scores.setdefault(trajectory["instance_id"], []).append(float(score))
    return scores
