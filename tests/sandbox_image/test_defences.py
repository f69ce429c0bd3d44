"""What the server finds out about its boxes, and that it stops where a required defence is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox_image.box.blueprint import Blueprint, SlotDirectory
from sandbox_image.box.defences import BASICS, REMEDIES, Defence, check_required, inspect
from sandbox_image.box.network import NetworkPolicy
from sandbox_image.errors import MissingDefenceError
from sandbox_image.kernel.cgroups import ControlGroups, GroupLimits, SlotGroup
from sandbox_image.kernel.shared_trees import SharedTrees
from tests.sandbox_image.running import Api, RunningServer, as_other_user, environment, open_directory, running, server_command
from tests.support.waiting import PATIENCE_S

CONTROL_GROUPS = {"memory_limit", "process_count_limit", "processor_shares"}
FACTS = {
    **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16),
    **{f"Namespace-{name}": f"{name}:[1]" for name in ("user", "pid", "net", "ipc", "uts", "mnt", "cgroup")},
    "NoNewPrivs": "1",
    "Seccomp": "2",
    "Pid": "1",
    "Uid": "60000\t60000\t60000\t60000",
    "Box-Interfaces": "lo+",
    "Box-Writable": "",
    "Box-Workspace": "1",
}


def defences_of(directory: Path, facts: dict[str, str], limits: dict[str, int] | None = None) -> dict[str, Defence]:
    """What is found in a box that reports these facts; it has the limits that were set, but for those given here."""
    groups = ControlGroups.prepare([], directory / "record", GroupLimits(2**30, 64), slots=1)
    blueprint = Blueprint("bubblewrap", directory, SharedTrees.plain([]), groups, (), "/usr", False, (), NetworkPolicy())
    place = SlotDirectory(directory, directory, 60_000, "/workspace", SlotGroup())
    return inspect(blueprint, place, FACTS | facts, blueprint.process_limits | (limits or {}))


def test_all_holds_but_what_needs_control_groups(tmp_path: Path) -> None:
    found = defences_of(tmp_path, {})
    assert [*found, "disk_limit"] == list(REMEDIES)
    assert {name for name, defence in found.items() if not defence.holds} == CONTROL_GROUPS
    check_required(found, BASICS)


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        ({"CapEff": "000001ffffffffff"}, {"no_capabilities"}),
        ({"CapBnd": "0000000000200000"}, {"no_capabilities"}),
        ({"NoNewPrivs": "0"}, {"no_new_privileges"}),
        ({"Seccomp": "0"}, {"seccomp", "keyrings"}),
        ({"Pid": "17"}, {"namespaces"}),
        ({"Namespace-ipc": os.readlink("/proc/self/ns/ipc")}, {"namespaces"}),
        ({"Namespace-user": os.readlink("/proc/self/ns/user")}, {"namespaces"}),
        ({"Uid": "0\t0\t0\t0"}, {"unprivileged_user"}),
        ({"Uid": "60000\t0\t60000\t60000"}, {"unprivileged_user"}),
        ({"Uid": "60001\t60001\t60001\t60001"}, {"unprivileged_user"}),
        ({"Box-Interfaces": "lo+ eth0+"}, {"no_network"}),
        ({"Box-Interfaces": "lo-"}, {"no_network"}),
        ({"Box-Writable": "/usr"}, {"read_only_system"}),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, facts: dict[str, str], missing: set[str]) -> None:
    found = defences_of(tmp_path, facts)
    assert {name for name, defence in found.items() if not defence.holds} == missing | CONTROL_GROUPS
    first = next(name for name in REMEDIES if name in missing)
    with pytest.raises(MissingDefenceError, match=f"the defence {first} is missing: .*; remedy: ."):
        check_required(found, BASICS)


def test_a_limit_that_was_not_set_is_missing(tmp_path: Path) -> None:
    assert not defences_of(tmp_path, {}, {"NOFILE": 2**20})["process_limits"].holds
    assert not defences_of(tmp_path, {}, {"CORE": -1})["process_limits"].holds
    assert defences_of(tmp_path, {}, {"NOFILE": 1024})["process_limits"].holds


async def test_health_names_every_defence(visitor: Api, server: RunningServer) -> None:
    _, health = await visitor.get("/health")
    as_root = os.stat(f"/proc/{server.process.pid}").st_uid == 0
    found: dict[str, Any] = health["defences"]
    missing = {name for name, defence in found.items() if not defence["holds"]}
    assert list(found) == list(REMEDIES)
    assert missing <= CONTROL_GROUPS | {"user_per_slot", "disk_limit"}
    assert ("user_per_slot" in missing) == (not as_root)
    assert found["seccomp"] == {"holds": True, "detail": "Seccomp 2"}


async def test_health_says_that_isolation_was_given_up() -> None:
    with running("--isolation", "none", slots=1) as server:
        api = Api.over(server)
        async with api.session:
            _, health = await api.get("/health")
    held = {name for name, defence in health["defences"].items() if defence["holds"]}
    assert held <= CONTROL_GROUPS | {"user_per_slot", "process_limits", "disk_limit"}


def refusal(directory: Path, prefix: list[str], *options: str) -> str:
    """What a server says that does not start."""
    command = [*prefix, *server_command(directory, *options, slots=1)]
    ended = subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
    assert not (directory / "data").exists()
    return ended.stderr


def test_a_required_defence_that_is_missing_stops_the_server() -> None:
    with open_directory(other_user=True) as directory:
        said = refusal(directory, as_other_user(directory), "--require", "user_per_slot")
    assert "the defence user_per_slot is missing: all slots run as the server's user" in said
    assert "remedy: run the server as root" in said


def test_a_disk_without_limit_stops_the_server_that_requires_one(short_path: Path) -> None:
    said = refusal(short_path, [sys.executable], "--workspaces-on-disk", "--require", "disk_limit")
    assert "the defence disk_limit is missing" in said


def test_a_machine_without_a_filter_stops_the_server(short_path: Path) -> None:
    """A kernel that says it is of an architecture for which there is no table."""
    said = refusal(short_path, ["setarch", "i686", sys.executable])
    assert "the defence seccomp is missing: Seccomp 0; remedy: run on x86_64 or aarch64" in said


def test_what_is_no_defence_cannot_be_required(tmp_path: Path) -> None:
    command = [sys.executable, *server_command(tmp_path, "--require", "luck")]
    ended = subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 2
    assert "invalid choice: 'luck'" in ended.stderr
