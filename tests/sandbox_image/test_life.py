"""A server's life: how it begins, why it refuses to, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sandbox_image.protocol import VERSION
from sandbox_image.storage.datadir import DataDir
from tests.sandbox_image.running import (
    Api,
    RunningServer,
    alive,
    as_other_user,
    environment,
    eventually,
    launch,
    open_directory,
    refusals,
    running,
    server_command,
    someone_runs,
    without_the_right_to_mount,
)
from tests.support.users import USERS
from tests.support.waiting import PATIENCE_S

BUSY = "setsid sleep {marker} & sleep {marker}"
NASTY = (
    "mkdir -p a/b && echo x > a/b/c && mkdir -m 0 shut &&"
    "python3 -c \"import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')\""
)


async def make_busy(server: RunningServer, marker: str) -> None:
    """Leave a slot with a tree that is hard to remove and a command that runs."""
    api = Api.over(server)
    async with api.session:
        # Such a workspace lies on disk.
        await api.reset(for_layer=True)
        await api.output(NASTY)
        body = json.dumps(
            {"slot_id": "slot_1", "tool": "bash", "args": {"command": BUSY.format(marker=marker)}, "timeout": 600}
        ).encode()
    connection = socket.socket(socket.AF_UNIX)
    with connection:
        connection.connect(server.socket)
        connection.sendall(b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert eventually(lambda: someone_runs(f"sleep {marker}"))


def start_parent(command: list[str]) -> subprocess.Popen[bytes]:
    """A process that starts a server."""
    return subprocess.Popen(command, cwd="/", env=environment(), stdout=subprocess.PIPE)


def fetch(url: str) -> dict[str, Any]:
    """GET over TCP."""
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return dict(json.load(answer))


@pytest.mark.parametrize("other_user", [False, True], ids=USERS)
async def test_it_dies_with_its_parent(marker: str, other_user: bool) -> None:
    """The parent is killed without a chance to say goodbye; it had made the directory for the server's data and socket."""
    with open_directory(other_user=other_user) as directory:
        prefix = as_other_user(directory) if other_user else [sys.executable]
        home = directory / "home"
        (home / "control").mkdir(parents=True)
        if other_user:
            shutil.chown(home, "nobody", "nogroup")
            shutil.chown(home / "control", "nobody", "nogroup")
        listen = [
            "--unix-socket",
            str(home / "control" / "socket"),
            "--data-dir",
            str(home),
            "--slots",
            "2",
            "--die-with-parent",
        ]
        parent_source = """
            import subprocess, sys, time
            child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            print(child.stdout.readline().decode().strip(), child.pid, flush=True)
            time.sleep(1000)
        """
        command = [sys.executable, "-c", textwrap.dedent(parent_source), *prefix, "-P", "-m", "sandbox_image.server", *listen]
        with start_parent(command) as parent:
            assert parent.stdout is not None
            ready, _, pid = parent.stdout.readline().decode().rpartition(" ")
            process = int(pid)
            assert json.loads(ready)["ready"]
            (directory / "socket").symlink_to(home / "control" / "socket")
            server = RunningServer(parent, directory, {})
            below = server.processes()
            assert process in below
            await make_busy(server, marker)
            parent.kill()
        assert eventually(lambda: not [pid for pid in (process, *below) if alive(pid)] and not someone_runs(marker))
        assert not home.exists()


@pytest.mark.parametrize("other_user", [False, True], ids=USERS)
async def test_boxes_die_with_a_killed_server_and_the_next_one_cleans_up(marker: str, other_user: bool) -> None:
    with open_directory(other_user=other_user) as directory:
        prefix = as_other_user(directory) if other_user else [sys.executable]
        command = [*prefix, *server_command(directory)]
        first = launch(command, directory)
        below = first.processes()
        await make_busy(first, marker)
        first.process.kill()
        first.process.wait()
        assert eventually(lambda: not [pid for pid in below if alive(pid)] and not someone_runs(marker))
        assert os.listdir(first.data / "layers")
        if other_user:
            # There only if the interpreter lies where that user cannot go.
            shutil.rmtree(directory / "python", ignore_errors=True)
            command = [*as_other_user(directory), *server_command(directory)]
        second = launch(command, directory)
        api = Api.over(second)
        async with api.session:
            assert await api.output("ls -A | wc -l") == "0\n"
            await api.output(NASTY)
        second.process.kill()
        second.process.wait()
        for server in (first, second):
            assert server.process.stdout is not None
            server.process.stdout.close()
        assert eventually(lambda: not [pid for pid in second.processes() if alive(pid)])
        DataDir.remove(second.data)
        assert not second.data.exists()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
async def test_it_stops_in_order_while_calls_run(marker: str, ending: signal.Signals) -> None:
    with running() as server:
        await make_busy(server, marker)
        below = server.processes()
        server.process.send_signal(ending)
        assert server.process.wait(PATIENCE_S) == 0
        assert not [pid for pid in below if alive(pid)]
        assert "socket" not in os.listdir(server.directory)


async def test_tcp_and_unix_socket() -> None:
    with running("--port", "0", slots=1) as server:
        port = server.ready["port"]
        assert server.ready == {"ready": True, "port": port, "unix_socket": server.socket, "version": VERSION}
        assert (await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/health"))["status"] == "ok"
        assert os.stat(server.socket).st_mode & 0o777 == 0o600


def refusal(directory: Path, *options: str, prefix: list[str] | None = None, **changes: str) -> str:
    """What a server says that ends at once."""
    command = [*(prefix or [sys.executable]), *server_command(directory, *options)]
    ended = subprocess.run(
        command, cwd="/", env={**environment(), **changes}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("slot server: ")
    return ended.stderr


def test_refusals(short_path: Path) -> None:
    (short_path / "token").write_text("\n")
    (short_path / "foreign" / "slots").mkdir(parents=True)
    (short_path / "foreign" / "slots" / "precious").touch()
    (short_path / "file").touch()
    cases = {
        ("--read-only", "/nowhere"): "no such file",
        ("--read-only", "nowhere"): "absolute",
        **{("--read-only", path): "boxes have their own" for path in ("/", "/proc/self", "/workspace/x", "/etc")},
        ("--token-file", str(short_path / "none")): "--token-file",
        ("--token-file", str(short_path / "token")): "empty",
        ("--port", "0", "--host", "192.0.2.1"): "cannot listen",
        ("--unix-socket", str(short_path / "no" / "directory")): "cannot listen",
        ("--data-dir", str(short_path / "foreign")): "not a slot server's",
        ("--data-dir", str(short_path / "file")): "--data-dir",
    }
    said = refusals(short_path, *cases)
    assert [reason for reason, text in zip(cases.values(), said, strict=True) if reason not in text] == []
    assert not (short_path / "data").exists()
    assert (short_path / "foreign" / "slots" / "precious").exists()


def test_a_data_directory_belongs_to_one_server(short_path: Path) -> None:
    with running(slots=1) as server:
        assert "another slot server" in refusal(short_path, "--data-dir", str(server.data))


def test_no_bubblewrap_no_server(short_path: Path) -> None:
    said = refusal(short_path, PATH=str(short_path))
    assert "bubblewrap is not installed" in said
    assert "apt-get install bubblewrap" in said
    assert "--isolation none" in said


WITHOUT_NAMESPACES = """
import ctypes, os, sys
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    ctypes.CDLL(None).unshare(0x10000000)
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.execv(sys.argv[1], sys.argv[1:])
os.read(ready[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{child}/{name}", "w") as file:
        file.write("0 0 4294967295")
os.write(go[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_bubblewrap_that_cannot_make_a_box_is_not_worked_around(short_path: Path) -> None:
    """There are no user namespaces: this is what a container or a hardened kernel does to bubblewrap."""
    if os.geteuid() != 0:
        pytest.skip("taking user namespaces away needs root")
    said = refusal(short_path, prefix=[sys.executable, "-c", WITHOUT_NAMESPACES, sys.executable])
    assert "Creating new namespace failed" in said
    assert "bubblewrap needs user namespaces" in said
    assert "seccomp=unconfined" in said
    assert not (short_path / "data").exists()


def test_root_of_a_namespace_with_one_user(short_path: Path) -> None:
    said = refusal(short_path, prefix=["unshare", "--user", "--map-root-user", "--mount", sys.executable])
    assert "be an ordinary user" in said


def test_a_tree_that_slots_cannot_reach(short_path: Path) -> None:
    """Root without the right to mount: everything must be reachable by path."""
    if os.geteuid() != 0:
        pytest.skip("needs root that gives up a capability")
    closed = short_path / "closed"
    (closed / "tree").mkdir(parents=True)
    closed.chmod(0o700)
    prefix = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable]
    said = refusal(short_path, "--read-only", str(closed / "tree"), prefix=prefix)
    assert "cannot reach" in said


async def test_root_without_the_right_to_mount() -> None:
    with running(slots=1, within=without_the_right_to_mount) as server:
        api = Api.over(server)
        async with api.session:
            assert await api.output("id -u") == "60000\n"


@pytest.mark.parametrize("other_user", [False, True], ids=USERS)
async def test_no_isolation_is_asked_for_by_name(marker: str, other_user: bool) -> None:
    with running("--isolation", "none", slots=2, other_user=other_user) as server:
        api = Api.over(server)
        async with api.session:
            _, health = await api.get("/health")
            assert (health["isolation"], health["limits"]["rlimit_core"]) == ("none", 0)
            result = await api.bash("echo out; pwd; cat; id -u")
            output, where, uid = result["output"].splitlines()
            assert (result["success"], result["metadata"]["sandboxed"], output) == (True, False, "out")
            assert uid != "0"
            assert where.endswith("/workspace")
            await api.output(f"setsid sleep {marker} & (sleep {marker} &) ; sleep {marker} &")
            assert not someone_runs(marker)
            assert (await api.bash(f"setsid sleep {marker} & sleep {marker}", timeout=0.3))["metadata"]["timeout"]
            assert not someone_runs(marker)
            await api.output('mkdir d; echo x > d/file; ln -s "$PWD/d" link; ln -s /etc/passwd out')
            for path in ("d/file", "/workspace/d/file", f"{where}/d/file", "link/file"):
                assert (await api.tool("read_file", {"path": path}))["output"] == "x\n"
            assert "outside" in (await api.tool("read_file", {"path": "out"}))["error"]
            assert await api.output("pwd", cwd="/workspace/d") == f"{where}/d\n"
            assert (await api.bash("python3 -c 'print(6 * 7)'"))["output"] == "42\n"
            await api.reset()
            assert await api.output("ls -A | wc -l") == "0\n"
            await make_busy(server, marker)
    assert not someone_runs(marker)


def test_own_mounts_are_seen_by_nobody_else() -> None:
    with running(slots=1) as server:
        assert str(server.directory) not in Path("/proc/self/mountinfo").read_text()


async def test_many_connections_wait_for_a_server_that_is_busy() -> None:
    with running() as server:
        connections = [socket.socket(socket.AF_UNIX) for _ in range(1000)]
        try:
            os.kill(server.process.pid, signal.SIGSTOP)
            for connection in connections:
                connection.setblocking(False)
                connection.connect(server.socket)
            os.kill(server.process.pid, signal.SIGCONT)
            api = Api.over(server)
            async with api.session:
                assert await api.output("echo fine") == "fine\n"
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
            for connection in connections:
                connection.close()


@pytest.mark.parametrize("pause", [0.0, 0.01, 0.03])
async def test_a_server_that_is_stopped_while_resets_wait_for_each_other(pause: float) -> None:
    with running(slots=3) as server:
        api = Api.over(server)
        async with api.session:
            slots = [Api(api.session, f"slot_{number}") for number in range(3)]
            resets = [asyncio.create_task(slot.reset(network=turn % 2 == 0)) for turn in range(6) for slot in slots]
            # All of them are on their way.
            await asyncio.wait(resets, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(pause)
            await asyncio.to_thread(server.stop)
            await asyncio.gather(*resets, return_exceptions=True)
        # Nothing may be left, which is seen to at the end.
