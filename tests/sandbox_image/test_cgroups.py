"""What the processes of a slot may use together: with the control groups of this machine, and with a tree like version 2's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_image.kernel.cgroups import ControlGroups, GroupLimits, Hierarchy, remove_group, remove_recorded
from sandbox_image.storage.datadir import DataDir
from tests.sandbox_image.running import Api, RunningServer, becomes, eventually, launch, open_directory, running, server_command
from tests.support.waiting import PATIENCE_S

LIMITS = GroupLimits(memory_bytes=256 * 1024**2, processes=64)


@pytest.fixture(scope="module")
def usable() -> list[Hierarchy]:
    """The hierarchies of this machine; skips where the tests may not make groups in them."""
    found = [hierarchy for hierarchy in Hierarchy.find() if os.access(hierarchy.group, os.W_OK)]
    if not {"memory", "pids", "cpu"} <= {name for hierarchy in found for name in hierarchy.controllers}:
        pytest.skip("control groups for memory, pids and cpu may not be made here")
    return found


@pytest.fixture(scope="module")
def limited(usable: list[Hierarchy]) -> Iterator[RunningServer]:
    """A server with `LIMITS`, of which no group is left."""
    with running("--memory-bytes", str(LIMITS.memory_bytes), "--processes", str(LIMITS.processes)) as server:
        record = (server.data / "cgroups").read_text().split()
        assert len(record) == len(usable)
        yield server
    assert left(record) == []


def groups_of(pid: int) -> set[str]:
    """The groups of servers that a process is in."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {line.rpartition("/hermes-envs-")[2].partition("/")[2] for line in lines if "/hermes-envs-" in line}


def left(record: list[str]) -> list[str]:
    """Which of some groups there are."""
    return [name for name in record if Path(name).exists()]


IN_THEIR_SLOTS = {frozenset({"slot_0"}), frozenset({"slot_1"})}


async def test_a_slot_is_in_its_group(limited: RunningServer) -> None:
    # One that has ended, or is only just starting, is in no group.
    assert await becomes(lambda: {frozenset(groups_of(pid)) for pid in limited.inits()} == IN_THEIR_SLOTS)
    assert groups_of(limited.process.pid) == set()
    api = Api.over(limited)
    async with api.session:
        _, health = await api.get("/health")
        assert set(health["limits"]["cgroups"]) == {"memory", "pids", "cpu"}
        assert health["limits"]["memory_bytes"] == LIMITS.memory_bytes
        await api.reset()
        assert await becomes(lambda: {frozenset(groups_of(pid)) for pid in limited.inits()} == IN_THEIR_SLOTS)


async def test_how_a_command_ends_whose_memory_is_used_up(limited: RunningServer) -> None:
    api = Api.over(limited)
    async with api.session:
        await api.reset()
        result = await api.bash("exec python3 -c 'data = b\"x\" * (400 << 20)'")
        assert (result["metadata"]["exit_code"], result["metadata"]["oom_killed"]) == (137, True)
        result = await api.bash("python3 -c 'data = b\"x\" * (400 << 20)'; echo then")
        assert (result["output"].splitlines()[-1], result["metadata"]["oom_killed"]) == ("then", True)
        result = await api.bash("kill -9 $$")
        assert (result["metadata"]["exit_code"], result["metadata"]["oom_killed"]) == (137, False)
        await api.tool(
            "write_file", {"path": "hungry.py", "content": "import time\ndata = b'x' * (90 << 20)\ntime.sleep(1000)\n"}
        )
        together = "for _ in 1 2 3 4; do python3 hungry.py & done; wait -n; kill -9 $(jobs -p)"
        assert (await api.bash(f"bash -c '{together}'"))["metadata"]["oom_killed"]
        assert await Api(api.session, "slot_1").output("echo untouched") == "untouched\n"
        fill = "for place in /tmp /dev/shm /run $HOME; do head -c 300M /dev/zero > $place/file; done; true"
        result = await api.bash(fill)
        assert (result["output"].count("No space left"), result["metadata"]["oom_killed"]) == (4, False)
        assert await api.output("echo fine") == "fine\n"


async def test_a_reset_lowers_the_limit_of_one_slot_until_the_next(limited: RunningServer, usable: list[Hierarchy]) -> None:
    version = next(hierarchy.version for hierarchy in usable if "memory" in hierarchy.controllers)
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    groups = [Path(line) for line in (limited.data / "cgroups").read_text().split()]
    [group] = [group for group in groups if (group / "slot_0" / name).exists()]
    api = Api.over(limited)
    async with api.session:
        for wanted, expected in ((100 << 20, 100 << 20), (64 << 20, 64 << 20), (1 << 40, 256 << 20), (None, 256 << 20)):
            # What is in memory goes with the workspace, the running command with its box.
            await api.output("head -c 30M /dev/zero > file; head -c 10M /dev/zero > /tmp/file")
            state = await api.reset(network=False, memory_bytes=wanted)
            assert state["memory_bytes"] == expected
            assert (group / "slot_0" / name).read_text() == f"{expected}\n"
            assert (group / "slot_1" / name).read_text() == f"{256 << 20}\n"
            result = await api.bash("head -c 500M /dev/zero > file")
            assert (result["metadata"]["oom_killed"], "No space left" in result["output"]) == (False, True)
            assert await api.output("wc -c < file") == f"{expected // 2}\n"
        _, health = await api.get("/health")
        assert health["limits"]["memory_bytes"] == LIMITS.memory_bytes
        for bad in (1 << 20, 0, -1, 1.5, "1G"):
            assert (await api.post("/reset", {"slot_id": "slot_0", "memory_bytes": bad}))[0] == 400


async def test_processes_of_a_slot_are_counted_together(limited: RunningServer) -> None:
    api = Api.over(limited)
    async with api.session:
        await api.reset()
        source = """
            import os, time
            count = 0
            try:
                while True:
                    if os.fork() == 0:
                        time.sleep(1000)
                        os._exit(0)
                    count += 1
            except BlockingIOError:
                print(40 < count < 64)
        """
        await api.tool("write_file", {"path": "bomb.py", "content": textwrap.dedent(source)})
        assert await api.output("python3 bomb.py") == "True\n"
        assert await api.output("echo again") == "again\n"


@pytest.mark.usefixtures("usable")
async def test_a_storm_of_processes_where_processors_are_scarce() -> None:
    """A thousand processes that fork without end share a fifth of a processor; the command ends as any whose time is over."""
    with running(slots=1) as server:
        groups = [Path(line) / "slot_0" for line in (server.data / "cgroups").read_text().split()]
        for group in groups:
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_quota_us").write_text("20000")
            elif (group / "cpu.max").exists():
                (group / "cpu.max").write_text("20000 100000")
        api = Api.over(server)
        async with api.session:
            result = await api.bash("f() { f | f & }; f; sleep 1000", timeout=0.5)
            assert result["metadata"]["timeout"] or not result["success"] or result["output"]
            assert await api.output("echo well") == "well\n"


@pytest.mark.usefixtures("usable")
def test_groups_of_a_killed_server_are_removed() -> None:
    with open_directory() as directory:
        first = launch([sys.executable, *server_command(directory)], directory)
        record = (first.data / "cgroups").read_text().split()
        first.process.kill()
        first.process.wait()
        assert first.process.stdout is not None
        first.process.stdout.close()
        assert left(record) == record
        assert DataDir.remove_abandoned(first.data)
        assert left(record) == []
        assert not first.data.exists()


async def test_each_process_has_a_limit_where_no_groups_may_be_made() -> None:
    with running("--memory-bytes", str(LIMITS.memory_bytes), other_user=True) as server:
        api = Api.over(server)
        async with api.session:
            _, health = await api.get("/health")
            if health["limits"]["cgroups"]:
                pytest.skip("an ordinary user may make control groups here")
            assert health["limits"]["rlimit_data"] == LIMITS.memory_bytes
            result = await api.bash("python3 -c 'data = b\"x\" * (400 << 20)'")
            assert "MemoryError" in result["output"]
            assert "oom_killed" not in result["metadata"]
            hungry = "python3 -c 'data = b\"x\" * (150 << 20)'"
            assert (await api.bash(hungry))["success"]
            # As far as it can be kept, and it says how far.
            assert (await api.reset(memory_bytes=100 << 20))["memory_bytes"] is None
            assert "MemoryError" in (await api.bash(hungry))["output"]
            await api.reset()
            assert (await api.bash(hungry))["success"]


def tree(directory: Path, *, enabled: str = "", members: str = "", limit: str = "max") -> Path:
    """Directories and files laid out like a hierarchy of version 2; what the kernel does when they are written is left out.

    Gives the group that a server is in.
    """
    top = directory / "cgroup"
    own = top / "jobs/mine"
    own.mkdir(parents=True)
    for group, controllers in ((top, "cpu memory pids"), (top / "jobs", "cpu memory pids"), (own, enabled)):
        (group / "cgroup.subtree_control").write_text(f"{controllers}\n")
        (group / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (own / "cgroup.procs").write_text(members)
    (own / "memory.max").write_text(f"{limit}\n")
    return own


def prepare(directory: Path) -> ControlGroups:
    """Groups in such a tree."""
    proc = directory / "proc"
    proc.mkdir()
    (proc / "mountinfo").write_text(f"31 23 0:28 / {directory}/cgroup rw,relatime - cgroup2 cgroup2 rw\n")
    (proc / "cgroup").write_text("0::/jobs/mine\n")
    return ControlGroups.prepare(Hierarchy.find(proc), directory / "record", LIMITS, slots=2)


def contents(group: Path) -> dict[str, str]:
    """The files of a group."""
    return {path.name: path.read_text() for path in group.iterdir() if path.is_file()}


def test_version_2_where_controllers_are_handed_on(tmp_path: Path) -> None:
    own = tree(tmp_path, enabled="cpu memory pids", members="1\n2\n", limit="1000000")
    groups = prepare(tmp_path)
    assert (groups.missing, groups.versions) == ({}, {"memory": 2, "pids": 2, "cpu": 2})
    (made,) = own.glob("hermes-envs-*")
    assert (tmp_path / "record").read_text() == f"{made}\n"
    assert contents(made) == {"cgroup.subtree_control": "+memory +pids +cpu", "cpu.weight": "200"}
    assert contents(made / "slot_1") == {"memory.max": "268435456", "memory.swap.max": "0", "pids.max": "64"}
    events = made / "slot_1/memory.events"
    events.write_text("low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n")
    group = groups.slot(1)
    group.add(1234)
    assert (made / "slot_1/cgroup.procs").read_text() == "1234"
    assert group.kills() == 2
    events.write_text("oom_kill 13\n")
    assert group.kills() == 13
    (made / "slot_1/memory.current").write_text("64\n")
    group.limit_memory(100)
    assert contents(made / "slot_1") | {"memory.max": "100", "memory.swap.max": "0"} == contents(made / "slot_1")
    assert group.events is not None
    os.close(group.events)


def test_version_2_goes_up_while_nobody_has_set_a_limit(tmp_path: Path) -> None:
    own = tree(tmp_path, members="1\n2\n")
    assert prepare(tmp_path).missing == {}
    assert [path.parent for path in tmp_path.rglob("hermes-envs-*")] == [own.parent]


def test_version_2_makes_room_when_it_is_alone_below_a_limit(tmp_path: Path) -> None:
    own = tree(tmp_path, members=f"{os.getpid()}\n", limit="1000000")
    assert prepare(tmp_path).missing == {}
    (made,) = own.glob("hermes-envs-*")
    assert (made / "server/cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_a_read_only_hierarchy_is_missing(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    own = tree(tmp_path, enabled="cpu memory pids")
    own.chmod(0o500)
    assert set(prepare(tmp_path).missing) == {"memory", "pids", "cpu"}


def test_no_hierarchy_at_all(tmp_path: Path) -> None:
    groups = ControlGroups.prepare([], tmp_path / "record", LIMITS, slots=2)
    assert set(groups.missing) == {"memory", "pids", "cpu"}
    assert groups.slot(0).kills() is None
    remove_recorded(tmp_path / "record")


def test_what_runs_in_a_group_of_version_2_is_ended_with_it() -> None:
    """On the machine's own hierarchy, whatever controllers it has."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line]
    if not places or not os.access(places[0], os.W_OK):
        pytest.skip("there is no hierarchy of version 2 that may be written")
    group = Path(places[0]) / f"hermes-envs-test-{os.getpid()}"
    (group / "slot_0").mkdir(parents=True)
    with subprocess.Popen(["sleep", "600"]) as process:
        (group / "slot_0/cgroup.procs").write_text(str(process.pid))
        remove_group(group)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert eventually(lambda: not group.exists())
