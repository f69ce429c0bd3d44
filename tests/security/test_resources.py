"""Attacks that take what there is for all: memory, disk, files, processors, time and the server's attention."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox_image.running import Api, begins
from tests.security.attack import Attack, python
from tests.security.field import Field, field_of
from tests.security.sites import BoxWithout, Outside
from tests.security.table import each, hold, still_works
from tests.support.growth import slowest
from tests.support.users import ORDINARY_USER, USERS

MEMORY_BYTES = 128 * 1024**2
PROCESSES = 60
WORKSPACE_BYTES = 16 * 1024**2
WORKSPACE_INODES = 500


@pytest.fixture(scope="module", params=USERS)
def field(request: pytest.FixtureRequest) -> Iterator[Field]:
    """A server that gives slots little, so that attacks need not take much."""
    limits = {
        "--memory-bytes": MEMORY_BYTES,
        "--processes": PROCESSES,
        "--workspace-bytes": WORKSPACE_BYTES,
        "--workspace-inodes": WORKSPACE_INODES,
    }
    options = [part for name, value in limits.items() for part in (name, str(value))]
    with field_of(*options, other_user=request.param == ORDINARY_USER) as field:
        yield field


def write(path: str, megabytes: int) -> str:
    """Fill a file; it has worked if all of it is there."""
    size = megabytes * 1024**2
    return f"head -c {size} /dev/zero > {path}; test $(stat -c %s {path}) = {size} && echo BREACH; rm -f {path}"


def make_files(directory: str, count: int) -> str:
    return python(
        f"""
        made = 0
        try:
            for made in range({count}):
                os.close(os.open(f"{directory}/{{made}}", os.O_CREAT | os.O_WRONLY))
            judge(True, made)
        finally:
            for number in range(made + 1):
                try:
                    os.unlink(f"{directory}/{{number}}")
                except FileNotFoundError:
                    pass
        """
    )


ATTACKS = [
    Attack("a full workspace", "fills the disk", write("big", 20), Outside()),
    Attack("many small files", "uses up the disk's inodes", make_files(".", WORKSPACE_INODES + 100), Outside()),
    Attack("a full /run", "fills memory", write("/run/big", 20), BoxWithout(("--size",))),
    Attack(
        "a file beyond every disk",
        "fills the disk",
        "truncate -s 5G huge && echo BREACH; rm -f huge",
        Outside(),
    ),
    Attack(
        "descriptors",
        "uses up the machine's open files",
        python("""
        opened = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (5000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            for _ in range(4500):
                opened.append(os.open("/dev/null", os.O_RDONLY))
            judge(True)
        except (OSError, ValueError) as error:
            judge(False, error)
        """),
        Outside(),
    ),
    Attack(
        "a core dump",
        "writes memory to a disk, or starts the host's handler of crashes",
        "ulimit -c unlimited && echo BREACH",
        Outside(),
    ),
    Attack(
        "limits taken back",
        "has as much as it likes",
        python("""
        for name in ("NPROC", "NOFILE", "CORE", "FSIZE", "MEMLOCK"):
            kind = getattr(resource, f"RLIMIT_{name}")
            try:
                hard = resource.getrlimit(kind)[1]
                resource.setrlimit(kind, (resource.RLIM_INFINITY if name != "NOFILE" else hard + 1,) * 2)
                judge(True, name)
            except (OSError, ValueError) as error:
                judge(False, name, error)
        """),
        Outside(needs_root=True),
    ),
]


@each(ATTACKS)
async def test_attack(field: Field, attack: Attack) -> None:
    await hold(field, attack)


async def limits(field: Field) -> dict[str, Any]:
    api = Api.over(field.server)
    async with api.session:
        return dict((await api.get("/health"))[1]["defences"])


ALLOCATE = python(
    """
    pieces = []
    for _ in range(int(os.environ["PIECES"])):
        # Pages that have not been written take no memory.
        pieces.append(bytearray(b"x") * (8 << 20))
    judge(True)
    """
)


async def test_memory(field: Field) -> None:
    """A slot that wants more than it may have loses a process; the server and the other slot go on."""
    attack = Attack("memory", "takes the machine's memory", f"export PIECES=24; {ALLOCATE}", Outside())
    assert "BREACH" in (await Outside().strike(attack, field)).text
    together = (await limits(field))["memory_limit"]["holds"]
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        result = await api.bash(attack.script)
        assert not result["success"], result
        assert "BREACH" not in result["output"]
        # Without control groups each process has a limit of its own, and is told so.
        assert result["metadata"].get("oom_killed", False) == together
        assert together or "MemoryError" in result["output"]
        # Files in memory are memory.
        filled = await api.bash(
            "for d in /tmp /dev/shm $HOME; do head -c 60M /dev/zero > $d/big; done; ls -l /tmp /dev/shm $HOME"
        )
        assert not filled["success"] or filled["output"].count(str(60 * 1024**2)) < 3
        await api.reset()
    await still_works(field)


async def test_memory_of_many(field: Field) -> None:
    """Each process stays small; together they are as large as one."""
    if not (await limits(field))["memory_limit"]["holds"]:
        pytest.skip("the server may make no control groups here")
    script = python(
        """
        ready, done = os.pipe()
        for _ in range(6):
            if os.fork() == 0:
                piece = bytearray(b"x") * (32 << 20)
                os.write(done, b".")
                time.sleep(1000)
        os.set_blocking(ready, False)
        there = ended = 0
        # Until all have theirs, or one has been killed for it.
        while there < 6 and not ended:
            time.sleep(0.01)
            try:
                there += len(os.read(ready, 10))
            except BlockingIOError:
                ended = os.waitpid(-1, os.WNOHANG)[0]
        judge(there == 6, there)
        sys.stdout.flush()
        os.killpg(0, signal.SIGKILL)
        """
    )
    attack = Attack("memory of many", "takes the machine's memory", script, Outside())
    assert "BREACH" in (await Outside().strike(attack, field)).text
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        assert "BREACH" not in (await api.bash(script))["output"]
    await still_works(field)


async def test_processes(field: Field) -> None:
    """A slot has as many processes as it may, whatever the other one has."""
    script = python(
        f"""
        children = []
        try:
            for _ in range({PROCESSES} + 10):
                child = os.fork()
                if child == 0:
                    signal.pause()
                children.append(child)
            judge(True)
        except OSError as error:
            judge(False, len(children), error)
        for child in children:
            os.kill(child, signal.SIGKILL)
        """
    )
    await hold(field, Attack("processes", "takes all processes", script, Outside()))
    if not (await limits(field))["process_count_limit"]["holds"]:
        pytest.skip("the server may make no control groups here: processes are counted by user")


async def test_threads(field: Field) -> None:
    """Threads count as processes do."""
    script = python(
        f"""
        try:
            for _ in range({PROCESSES} + 10):
                threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
            judge(True)
        except RuntimeError as error:
            judge(False, error)
        sys.stdout.flush()
        os._exit(0)
        """
    )
    await hold(field, Attack("threads", "takes all processes", script, Outside()))


async def test_output_without_end(field: Field) -> None:
    """What nobody keeps takes no memory."""
    flood = "yes | head -c 40000000"
    control = await asyncio.to_thread(subprocess.run, ["sh", "-c", flood], capture_output=True, check=True)
    assert len(control.stdout) == 40_000_000
    del control
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        before = resident_bytes(field)
        result = await api.bash(flood)
        assert (result["metadata"]["output_bytes"], result["metadata"]["truncated"]) == (40_000_000, True)
        assert len(result["output"]) < 1_100_000
        assert resident_bytes(field) - before < 15_000_000
        assert (await api.bash("yes", timeout=0.3))["metadata"]["timeout"]
    await still_works(field)


def resident_bytes(field: Field) -> int:
    status = Path(f"/proc/{field.server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


async def test_time(field: Field) -> None:
    """Endless work ends with its time, and the other slot works meanwhile."""
    endless = "while :; do :; done & while :; do :; done"
    control = await asyncio.create_subprocess_exec("sh", "-c", f"exec timeout 0.5 sh -c '{endless}'", start_new_session=True)
    await asyncio.sleep(0.2)
    assert control.returncode is None
    await control.wait()
    one, two = Api.over(field.server), Api.over(field.server)
    two.slot = "slot_1"
    async with one.session, two.session:
        await one.reset()
        alone = await slowest(lambda: two.output("true"), count=10)
        busy = f"touch begun; for i in 1 2 3 4 5 6; do while :; do :; done & done; {endless}"
        working = asyncio.create_task(one.bash(busy, timeout=0.8))
        assert await begins(one)
        beside = await slowest(lambda: two.output("true"), count=10, during=working)
        assert (await working)["metadata"]["timeout"]
        # By one of the eight processes at a time it would wait for eight times as long at least, again and again.
        assert beside < 20 * alone + 1
    await still_works(field)


async def test_many_links_and_names(field: Field) -> None:
    """A circle of links and a path of thousands of names cost nothing to refuse."""
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        await api.bash(
            "ln -s loop loop; for i in $(seq 45); do ln -s l$((i + 1)) l$i; done; ln -s $(printf 'd/%.0s' $(seq 2000)) long"
        )
        for path in ("loop", "l1", "long/x", "/".join(["d"] * 2000), "../" * 1300, "a" * 5000):
            status, answer = await api.post("/artifacts/read", {"slot_id": "slot_0", "path": path})
            assert status in (400, 403, 404), answer
            assert not (await api.tool("write_file", {"path": path, "content": "x"}))["success"]
    await still_works(field)
