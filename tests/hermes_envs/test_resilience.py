"""Whatever is killed in the middle of a run, every rollout ends scored or counted, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

import pytest
from atroposlib.envs.base import APIServerConfig
from rich.console import Console

from hermes_envs.env import AgentEnv, AgentEnvConfig, AgentTask
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.runs.group_queue import GroupQueue, QueueOptions
from hermes_envs.runs.reporter import Reporter
from hermes_envs.tools.call import ToolCall
from hermes_envs.workspace import Workspace
from tests.support.processes import below, mentioning
from tests.support.small_task import write_task_folder
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent.parent
GROUPS, GROUP_SIZE = 50, 4


class NoteEnv(AgentEnv):
    """Write a number into a file, slowly."""

    name = "note"

    def __init__(self, config: AgentEnvConfig) -> None:
        super().__init__(config, [APIServerConfig(base_url="")])
        self._items = iter(range(GROUPS))

    async def get_next_item(self) -> int | None:
        return next(self._items, None)

    async def build_task(self, item: int) -> AgentTask:
        commands = (f"printf {item} > note; sleep 0.05", "sleep 0.05; cat note")
        reference = [ToolCall(f"c{number}", "terminal", {"command": command}) for number, command in enumerate(commands)]
        return AgentTask(prompt=[{"role": "user", "content": "Write it down."}], reference=reference)

    async def verify_and_score_trajectory(self, task: AgentTask, episode: Episode, workspace: Workspace) -> Score:
        return Score(float(await workspace.read("note") == str(task.item).encode()), "the note was read")


async def cause_trouble(environment: AgentEnv, chance: random.Random, struck: dict[str, int]) -> None:
    """Kill the slot server, a process in a box, a rollout or a group, again and again, whenever slots are in use."""
    server_strike = 0.0
    while True:
        await asyncio.sleep(chance.uniform(0.05, 0.3))
        kind = chance.choice(["server", "box", "box", "rollout", "rollout", "group"])
        if environment.backend.get_stats().slots_in_use == 0 or (kind == "server" and time.monotonic() < server_strike + 2):
            continue
        struck[kind] = struck.get(kind, 0) + 1
        if kind in ("rollout", "group"):
            tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith(kind)]
            chance.choice(tasks).cancel()
            continue
        if kind == "server":
            server_strike = time.monotonic()
        targets = [
            process.pid for process in below(os.getpid()) if ("sandbox_image.server" in process.command) == (kind == "server")
        ]
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(targets), signal.SIGKILL)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory that belongs to the test alone, so that leftovers can be seen."""
    # Slots may run as other users, who have to get there.
    folder = Path(tempfile.mkdtemp(prefix="resilience-"))
    folder.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def assert_nothing_is_left(temporary: Path) -> None:
    # wandb makes two directories when it is imported, and removes them unless it is killed.
    leftovers = [path for path in temporary.iterdir() if "wandb" not in path.name]
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and (leftovers or mentioning(str(temporary))):
        time.sleep(0.1)
        leftovers = [path for path in leftovers if path.exists()]
    assert not mentioning(str(temporary))
    assert str(temporary) not in Path("/proc/mounts").read_text()
    assert not leftovers
    shutil.rmtree(temporary)


async def test_a_run_under_fire_loses_no_rollout(temporary: Path) -> None:
    config = AgentEnvConfig(policy="oracle", use_wandb=False, group_size=GROUP_SIZE, local_slots=8, acquire_timeout_s=60)
    environment = NoteEnv(config)
    struck: dict[str, int] = {}
    saved: list[int] = []

    async def save(item: int, group: object) -> None:
        saved.append(item)

    async with environment.running():
        reporter = Reporter("note", Console(file=StringIO()))
        queue = GroupQueue(
            environment.get_next_item,
            environment.collect_group,
            environment.item_name,
            save,
            reporter,
            GROUP_SIZE,
            QueueOptions(max_concurrent_groups=4, group_attempts=3),
        )
        trouble = asyncio.create_task(cause_trouble(environment, random.Random(7), struck), name="trouble")
        try:
            await queue.run(GROUPS, environment.summary)
        finally:
            trouble.cancel()
            await asyncio.gather(trouble, return_exceptions=True)
        restarts = environment.backend.get_stats().sandbox_restarts
        assert environment.backend.get_stats().slots_in_use == 0
    summary = environment.summary
    assert summary.trajectories + summary.infrastructure_errors == GROUPS * GROUP_SIZE
    # What was scored was scored rightly: trouble never looks like a wrong answer.
    assert summary.mean_score == 1.0
    assert len(saved) == summary.groups
    assert {"server", "box", "rollout", "group"} <= set(struck), struck
    assert restarts > 0
    assert not below(os.getpid())
    await asyncio.to_thread(assert_nothing_is_left, temporary)


def start_process(directory: Path, temporary: Path) -> subprocess.Popen[str]:
    """Start `process` on forty tasks, one rollout for each, into `out.jsonl`."""
    write_task_folder(directory / "tasks", rows=40)
    options = {"dataset_name": "tasks", "policy": "oracle", "group_size": 1, "local_slots": 2, "use_wandb": "false"}
    options |= {"data_path_to_save_groups": "out.jsonl", "cache_directory": "cache"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-m", "hermes_envs.swe_smith", "process", *(f"--env.{key}={value}" for key, value in options.items())],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killing_the_whole_run_leaves_what_was_collected_and_nothing_else(tmp_path: Path, temporary: Path) -> None:
    with start_process(tmp_path, temporary) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "group 2:" in line:
                run.kill()
                break
    groups = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(groups) >= 2
    assert all(group["scores"] == [1.0] for group in groups)
    assert_nothing_is_left(temporary)


def test_sigterm_ends_a_run_with_its_account(tmp_path: Path, temporary: Path) -> None:
    with start_process(tmp_path, temporary) as run:
        assert run.stdout is not None
        output = []
        for line in run.stdout:
            output.append(line)
            if "group 1:" in line:
                run.terminate()
    assert run.returncode == 1
    text = "".join(output)
    assert "mean score" in text
    assert "interrupted" in text
    assert "Traceback" not in text
    assert_nothing_is_left(temporary)
