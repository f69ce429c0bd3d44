"""The one command as a process: what it starts, how it ends, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from hermes_envs.train.__main__ import main
from hermes_envs.train.companions import Companions
from hermes_envs.train.metrics import FILE, read_metrics
from tests.support.rollout_api import RolloutApi
from tests.train.demonstration import tinker_service, trainer, write_config
from tests.train.walk import EVALUATED

pytest.importorskip("torch")
pytest.importorskip("tinker")

from tests.support.waiting import PATIENCE_S, until
from tests.train.models import service_that_hangs

NOWHERE = "http://127.0.0.1:1"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(walker: Path) -> AsyncIterator[str]:
    async with tinker_service(walker) as address:
        yield address


async def run(*arguments: str, base_url: str = NOWHERE) -> tuple[int | None, str]:
    """The status of a trainer that ends by itself, and what it said."""
    async with trainer(*arguments, base_url=base_url) as process, asyncio.timeout(PATIENCE_S):
        _, said = await process.communicate()
    return process.returncode, said.decode()


def processes_of(config: Path) -> list[str]:
    """The command lines that have to do with a run: by its file, or by the port of its run-api."""
    sections = yaml.safe_load(config.read_text())
    marks = (str(config), f"--port {sections['env']['rollout_server_url'].rpartition(':')[2]}")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [line for mark in marks if mark in line]
    return found


def steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / FILE
    return read_metrics(path) if path.exists() else []


async def test_a_file_that_cannot_work_ends_with_one_line(tmp_path: Path, walker: Path) -> None:
    config = write_config(tmp_path, walker, tinker={"lora_rnk": 8})
    status, said = await run("--config", str(config))
    assert status == 1
    assert said == f"error: config: {config}: tinker.lora_rnk: there is no such option\n"


def test_a_port_that_is_taken_is_an_error(
    tmp_path: Path, walker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write_config(tmp_path, walker, tinker={"inference_port": port})
        monkeypatch.setattr("sys.argv", ["train", "--config", str(config)])
        monkeypatch.setenv("TINKER_BASE_URL", NOWHERE)
        monkeypatch.setenv("TINKER_API_KEY", "tml-none")
        assert main() == 1
    assert f"error: tinker.inference_port: port {port} is in use" in capsys.readouterr().err


async def test_an_environment_that_fails_ends_the_run_with_its_reason(tmp_path: Path, walker: Path, service: str) -> None:
    config = write_config(tmp_path, walker, env={"nonsense": 1})
    status, said = await run("--config", str(config), "--environment", "tests.train.walk", base_url=service)
    assert status == 1
    assert "error: environment ended with status 1" in said
    assert "unknown key env.nonsense" in said
    assert processes_of(config) == []


async def test_a_run_ends_with_the_evaluation_that_its_last_step_is_due(tmp_path: Path, walker: Path, service: str) -> None:
    """And a file that names a policy for `process` is as good as another."""
    env = {"policy": "oracle", "total_steps": 1, "steps_per_eval": 1, "data_dir_to_save_evals": str(tmp_path / "evaluations")}
    config = write_config(tmp_path, walker, env)
    status, said = await run("--config", str(config), "--environment", "tests.train.walk", base_url=service)
    assert status == 0, said
    [line] = (tmp_path / "evaluations" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
    assert json.loads(line)["metrics"]["items"] == EVALUATED
    assert processes_of(config) == []


async def test_a_stop_is_heard_while_the_service_hangs(tmp_path: Path, walker: Path, run_api: RolloutApi) -> None:
    config = write_config(tmp_path, walker, {"rollout_server_url": run_api.address})
    async with (
        service_that_hangs() as (address, asked),
        trainer("--config", str(config), base_url=address) as process,
        asyncio.timeout(PATIENCE_S),
    ):
        await asked.wait()
        process.terminate()
        _, said = await process.communicate()
    assert (process.returncode, said.decode().splitlines()[-1]) == (1, f"interrupted: {tmp_path / 'run'}")


async def test_what_earlier_runs_said_stays_and_is_not_said_again(tmp_path: Path) -> None:
    for said in ("first", "second"):
        async with Companions(tmp_path) as companions, asyncio.timeout(PATIENCE_S):
            await companions.start("module", f"no_{said}_module", ())
            await companions.ended("module")
            assert f"no_{said}_module" in companions.failure.result()
    assert "no_first_module" not in companions.failure.result()
    assert all(f"no_{said}_module" in (tmp_path / "module.log").read_text() for said in ("first", "second"))


async def test_a_stop_saves_and_a_second_run_goes_on_and_not_even_a_kill_leaves_anything(
    tmp_path: Path, walker: Path, service: str
) -> None:
    config = write_config(tmp_path, walker)
    arguments = ("--config", str(config), "--environment", "tests.train.walk")
    async with trainer(*arguments, base_url=service) as process:
        await until(lambda: len(steps(tmp_path)) >= 2)
        assert len(processes_of(config)) >= 3
        process.terminate()
        _, said = await process.communicate()
    assert (process.returncode, said.decode().splitlines()[-1]) == (1, f"interrupted: {tmp_path / 'run'}")
    assert processes_of(config) == []
    reached = len(steps(tmp_path))
    assert (tmp_path / "run" / f"step-{reached:08d}.json").exists()

    async with trainer(*arguments, base_url=service) as process:
        await until(lambda: len(steps(tmp_path)) > reached)
        assert process.stderr is not None
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: processes_of(config) == [])
    assert [row["step"] for row in steps(tmp_path)] == list(range(len(steps(tmp_path))))
