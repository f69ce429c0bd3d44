"""Real slot servers for tests, as root or as an ordinary user, and a client that sends whatever it is told."""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

from sandbox_image.init import descendants
from sandbox_image.kernel.cgroups import remove_recorded
from sandbox_image.storage.trees import remove_tree
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
OTHER_USER = "nobody"
IN_OWN_MOUNTS = ["unshare", "--mount", "--propagation", "slave"]


@dataclass(frozen=True)
class RunningServer:
    """A slot server that listens; `directory` holds its socket and its data."""

    process: subprocess.Popen[bytes]
    directory: Path
    ready: dict[str, Any]

    @property
    def socket(self) -> str:
        """Path of its unix socket."""
        return str(self.directory / "socket")

    @property
    def data(self) -> Path:
        """Its data directory."""
        return self.directory / "data"

    def workspace(self, slot: int = 0) -> Path:
        """Where a slot's workspace is, by a path that works from outside of the server's mount namespace."""
        tails = tuple(f"/slot_{slot}/{place}/workspace" for place in ("front", "back"))
        mounts = Path(f"/proc/{self.process.pid}/mountinfo").read_text().splitlines()
        # That of the slot before the last reset may not have gone yet.
        *_, mounted = [point for point in (line.split()[4] for line in mounts) if point.endswith(tails)]
        return Path(f"/proc/{self.process.pid}/root{mounted}")

    def processes(self) -> list[int]:
        """The server and everything below it."""
        return [self.process.pid, *descendants(self.process.pid)]

    def inits(self) -> list[int]:
        """The processes that are PID 1 of a box."""
        lines = {pid: command_line(pid) for pid in self.processes()}
        return [pid for pid, line in lines.items() if _is_init(line)]

    def stop(self) -> int:
        """End it in order; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def _is_init(line: str) -> bool:
    return "bwrap" not in line and ("init.py" in line or line.startswith("/bin/sh -c "))


def command_line(pid: int) -> str:
    """A process's arguments; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX"


def someone_runs(marker: str) -> bool:
    """Whether a process anywhere has this text among its arguments."""
    return any(marker in command_line(int(name)) for name in os.listdir("/proc") if name.isdigit())


def new_marker() -> str:
    """A duration that no other process sleeps for."""
    return f"{secrets.randbelow(10**6) + 1000}.{secrets.randbelow(10**9)}"


def eventually(condition: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
    """Whether a condition comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def becomes(condition: Callable[[], object]) -> bool:
    """Whether a condition comes true; the event loop goes on."""
    return await asyncio.to_thread(eventually, condition)


def server_command(directory: Path, *options: str, slots: int = 2) -> list[str]:
    """The command line of a server in a directory."""
    listen = ["--unix-socket", str(directory / "socket")]
    return ["-P", "-m", "sandbox_image.server", *listen, "--data-dir", str(directory / "data"), "--slots", str(slots), *options]


def environment(checkout: Path = ROOT) -> dict[str, str]:
    """What a server needs, and a secret that nobody in a box may see."""
    path = f"{checkout}:{sysconfig.get_path('purelib')}"
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": path,
        "HIDDEN_SECRET": "s3cret-of-the-host",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _passable(path: str) -> bool:
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in Path(os.path.realpath(path)).parents)


def as_other_user(directory: Path) -> list[str]:
    """How a command line begins that runs the interpreter as an ordinary user; skips the test where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    if not _passable(str(ROOT / "sandbox_image")) or not _passable(sysconfig.get_path("purelib")):
        pytest.skip("another user cannot read this checkout")
    become = ["setpriv", f"--reuid={OTHER_USER}", "--regid=nogroup", "--clear-groups"]
    interpreter = os.path.realpath(sys.executable)
    prefix = Path(os.path.realpath(sys.base_prefix))
    closed = next((str(path) for path in reversed(prefix.parents) if not path.stat().st_mode & stat.S_IXOTH), None)
    if closed is None:
        return [*become, interpreter]
    # In a mount namespace of its own, put an open directory in the place of the closed one, with only the interpreter in it.
    held = directory / "python"
    held.mkdir()
    replace = 'mount --bind "$1" "$2" && mount -t tmpfs -o mode=755 none "$3" && mkdir -p "$1" && mount --move "$2" "$1"'
    script = f'{replace} && shift 3 && exec "$@"'
    return [*IN_OWN_MOUNTS, "sh", "-c", script, "sh", str(prefix), str(held), closed, *become, interpreter]


@contextmanager
def open_directory(*, other_user: bool = False, memory: bool = False) -> Iterator[Path]:
    """An empty directory that every user can pass, unlike pytest's own; in memory where thousands of directories are made."""
    where = "/dev/shm" if memory and os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="slot-server-test-", dir=where))
    directory.chmod(0o711)
    if other_user:
        shutil.chown(directory, OTHER_USER, "nogroup")
    try:
        yield directory
    finally:
        # Of a server that a test has killed.
        remove_recorded(directory / "data/cgroups")
        remove_tree(directory)


def on_small_disk(directory: Path, megabytes: int) -> list[str]:
    """How a command line begins for a server whose directory has little room; skips the test where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    script = 'mount -t tmpfs -o "size=$1m,mode=755" none "$2" && shift 2 && exec "$@"'
    (directory / "data").mkdir()
    return [*IN_OWN_MOUNTS, "sh", "-c", script, "sh", str(megabytes), str(directory / "data"), sys.executable]


def on_overlay(directory: Path) -> list[str]:
    """How a command line begins for a server whose data lies on an overlay, as in a container; skips where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("mounting an overlay for a whole server needs root")
    script = 'mount -t overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" none "$1/data" && shift && exec "$@"'
    for name in ("lower", "upper", "work", "data"):
        (directory / name).mkdir()
    return [*IN_OWN_MOUNTS, "sh", "-c", script, "sh", str(directory), sys.executable]


def without_the_right_to_mount(directory: Path) -> list[str]:
    """How a command line begins for a server that is root, but may not mount."""
    # The interpreter is put where everybody can reach it; then the right is dropped.
    prefix = as_other_user(directory)
    index = prefix.index("setpriv")
    return [*prefix[:index], "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", prefix[-1]]


@contextmanager
def running(
    *options: str, slots: int = 2, other_user: bool = False, within: Callable[[Path], list[str]] | None = None
) -> Iterator[RunningServer]:
    """A server for a while; afterwards neither a process of it nor its data may be left.

    `within` gives the beginning of its command line, in place of the interpreter alone.

    That of another user runs the init's Python loop, the other one the compiled loop if there is one: both are tested.
    """
    with open_directory(other_user=other_user) as directory:
        prefix = as_other_user(directory) if other_user else [sys.executable] if within is None else within(directory)
        checkout = without_compiled_loop(directory) if other_user else ROOT
        server = launch([*prefix, *server_command(directory, *options, slots=slots)], directory, checkout=checkout)
        try:
            yield server
        finally:
            below = server.processes()
            status = server.stop()
            server.process.stdout.close()  # type: ignore[union-attr]
        assert status == 0
        assert not [pid for pid in below if alive(pid)]
        assert not server.data.exists() or not os.listdir(server.data)


def without_compiled_loop(directory: Path) -> Path:
    """A copy of the package in which the init has its Python loop alone."""
    checkout = directory / "checkout"
    shutil.copytree(
        ROOT / "sandbox_image", checkout / "sandbox_image", ignore=shutil.ignore_patterns("libinit.so", "__pycache__")
    )
    return checkout


def launch(
    command: list[str], directory: Path, *, stdin: int | None = subprocess.DEVNULL, checkout: Path = ROOT
) -> RunningServer:
    """Start a server and wait until it listens; fails with what it printed if it does not."""
    process = subprocess.Popen(command, cwd="/", env=environment(checkout), stdin=stdin, stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"the server ended with status {process.wait()}")
    return RunningServer(process, directory, json.loads(line))


REFUSALS = """
import json, os, sys
from sandbox_image import server
answers = []
for arguments, variables in json.load(sys.stdin):
    out, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.environ.update(variables)
        sys.argv[1:] = arguments
        os._exit(server.main())
    os.close(write)
    with open(out) as said:
        text = said.read()
    answers.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text])
json.dump(answers, sys.stdout)
"""


def refusals(directory: Path, *cases: Sequence[str], prefix: Sequence[str] = (), **variables: str) -> list[str]:
    """What servers say that end at once, started with these options; the interpreter is started once for all of them."""
    commands = [(server_command(directory, *options)[3:], variables) for options in cases]
    asked = subprocess.run(
        [*(prefix or [sys.executable]), "-P", "-c", REFUSALS],
        cwd="/",
        env=environment(),
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    said = []
    for status, text in json.loads(asked.stdout):
        assert (status, text.count("\n"), text.startswith("slot server: ")) == (1, 1, True), text
        said.append(text)
    return said


class Api:
    """Requests to a server; each method gives the status and the decoded body."""

    def __init__(self, session: aiohttp.ClientSession, slot: str = "slot_0") -> None:
        self.session = session
        self.slot = slot
        self.lease = ""

    @classmethod
    def over(cls, server: RunningServer) -> Self:
        """Over the server's unix socket."""
        return cls(aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(server.socket)))

    async def post(self, route: str, payload: object, **options: Any) -> tuple[int, Any]:
        """Send JSON."""
        async with self.session.post(route, data=io.BytesIO(json.dumps(payload).encode()), **options) as response:
            return response.status, json.loads(await response.read())

    async def get(self, route: str) -> tuple[int, Any]:
        """Ask."""
        async with self.session.get(route) as response:
            return response.status, json.loads(await response.read())

    async def reset(self, **options: Any) -> dict[str, Any]:
        """Reset the slot and take its new lease."""
        status, state = await self.post("/reset", {"slot_id": self.slot, **options})
        assert status == 200, state
        self.lease = state["lease"]
        return dict(state)

    async def tool(self, tool: str, args: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Run a tool that the server must not refuse; its result."""
        status, result = await self.post("/execute", {"slot_id": self.slot, "tool": tool, "args": args, **options})
        assert status == 200, result
        return dict(result)

    async def bash(self, command: str, *, timeout: float = PATIENCE_S, **args: Any) -> dict[str, Any]:
        """Run a command; its result."""
        return await self.tool("bash", {"command": command, **args}, timeout=timeout)

    async def stateful(self, command: str, *, timeout: float = PATIENCE_S, **args: Any) -> dict[str, Any]:
        """Run a command in the shell that keeps its state; its result."""
        return await self.tool("bash_stateful", {"command": command, **args}, timeout=timeout)

    async def output(self, command: str, **args: Any) -> str:
        """The output of a command that must succeed."""
        result = await self.bash(command, **args)
        assert result["success"], result
        return str(result["output"])

    async def tmux(self, action: str, *, timeout: float = PATIENCE_S, **args: Any) -> dict[str, Any]:
        """An action of the terminal that must succeed; its result."""
        result = await self.tool("tmux", {"action": action, **args}, timeout=timeout)
        assert result["success"], result
        return result


async def init_of(api: Api, server: RunningServer) -> int:
    """The process on the host that is PID 1 of a slot's box."""
    namespace = (await api.output("readlink /proc/self/ns/pid")).strip()
    return next(pid for pid in server.inits() if os.readlink(f"/proc/{pid}/ns/pid") == namespace)


async def begins(api: Api, name: str = "begun") -> bool:
    """Whether a command of the slot that is running makes a file; it can be asked for meanwhile."""
    for _ in range(int(PATIENCE_S / 0.01)):
        if (await api.post("/artifacts/read", {"slot_id": api.slot, "path": name}))[0] == 200:
            return True
        await asyncio.sleep(0.01)
    return False


async def all_started(api: Api, server: RunningServer) -> None:
    """Wait until both slots of a server have a box that is used next, and a spare one that has been checked."""
    for slot in ("slot_0", "slot_1"):
        await Api(api.session, slot).reset()
    open_files = f"/proc/{server.process.pid}/fd"
    steady = 0
    while steady < 10:
        before = len(os.listdir(open_files))
        await asyncio.sleep(0.02)
        steady = steady + 1 if len(server.inits()) == 4 and len(os.listdir(open_files)) == before else 0
