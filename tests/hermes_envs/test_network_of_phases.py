"""Who has network when: a layer that is built always, the agent if it is allowed, grading never."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from atroposlib.envs.base import APIServerConfig

from hermes_envs.swe_smith import SweSmithConfig, SweSmithEnv
from tests.support.small_task import PASS_TO_PASS, write_task_folder
from tests.support.web_site import ADDRESS, site

NEEDS_A_PACKAGE_AND_NO_NETWORK = """\
import os
import socket

import pytest
import thing_of_the_index


def test_graded():
    assert thing_of_the_index.ANSWER == 42
    assert not [name for name in os.environ if name.lower().endswith("_proxy")]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 3128), 5)
"""


def write_index(directory: Path) -> None:
    """A package index (PEP 503) with one package."""
    name = "thing_of_the_index-1.0-py3-none-any.whl"
    project = directory / "simple/thing-of-the-index"
    project.mkdir(parents=True)
    with zipfile.ZipFile(project / name, "w") as wheel:
        information = "thing_of_the_index-1.0.dist-info"
        wheel.writestr("thing_of_the_index.py", "ANSWER = 42\n")
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: thing-of-the-index\nVersion: 1.0\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    (project / "index.html").write_text(f'<a href="{name}">{name}</a>')


@pytest.mark.parametrize("allow_network", [False, True])
async def test_phases(tmp_path: Path, allow_network: bool) -> None:
    write_index(tmp_path / "site")
    with site(tmp_path / "site") as port:
        install = f"pip install --trusted-host {ADDRESS} --index-url http://{ADDRESS}:{port}/simple thing-of-the-index"
        write_task_folder(
            tmp_path / "tasks",
            files={"tests/test_graded.py": NEEDS_A_PACKAGE_AND_NO_NETWORK},
            install_commands=[install],
            PASS_TO_PASS=[*PASS_TO_PASS, "tests/test_graded.py::test_graded"],
        )
        config = SweSmithConfig(
            dataset_name=str(tmp_path / "tasks"),
            policy="oracle",
            use_wandb=False,
            local_slots=1,
            cache_directory=str(tmp_path / "cache"),
            allow_network=allow_network,
            network_allowed_hosts=[f"{ADDRESS}:{port}"],
        )
        env = SweSmithEnv(config, [APIServerConfig(base_url="")])
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
            async with env.backend.slot("another") as slot:
                shown = await env.backend.execute(slot, "bash", {"command": "env | grep -c http_proxy"})
        assert trajectory.score is not None
        assert trajectory.score.value == 1.0, trajectory.score
        assert shown.output == f"{int(allow_network)}\n"
