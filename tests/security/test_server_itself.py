"""Attacks on the slot server: its environment, memory, sockets, token and control of the boxes."""

from __future__ import annotations

import asyncio
import os
import pty
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import aiohttp

from tests.sandbox_image.running import Api, alive, eventually, launch, open_directory, server_command
from tests.security.attack import Attack, kills, leaks, python
from tests.security.field import Field, field_of
from tests.security.sites import BoxWithout, InSlot, Outside
from tests.security.table import each, hold, still_works
from tests.support.waiting import PATIENCE_S

_VICTIM = """
import subprocess
import sys
victim = 1
if os.environ.get("TARGET") == "an ordinary process":
    code = "import os, time; os.set_inheritable(os.open('/dev/zero', os.O_RDONLY), True); time.sleep(60)"
    started = subprocess.Popen([sys.executable, "-I", "-c", code])
    victim = started.pid
    while not os.path.exists(f"/proc/{victim}/fd/3"):
        time.sleep(0.01)
"""


def on_init(source: str) -> str:
    """An attack on PID 1 of the box; one on an ordinary process of the same user where the caller says so."""
    return python(source, _VICTIM)


ON_AN_ORDINARY_PROCESS = InSlot(variables=(("TARGET", "an ordinary process"),))

ATTACKS = [
    Attack(
        "the environment of all processes",
        "learns the server's secrets",
        "cat /proc/[0-9]*/environ | tr '\\0' '\\n'",
        Outside(),
        leaks,
    ),
    Attack(
        "the environment of PID 1",
        "learns the server's secrets",
        "cat /proc/1/environ",
        BoxWithout(added=("--clearenv",), secret_environment=True),
        leaks,
    ),
    Attack(
        "the arguments of all processes",
        "learns where the data is",
        python("""
        for process in filter(str.isdigit, os.listdir("/proc")):
            with open(f"/proc/{process}/cmdline", "rb") as file:
                if b"--data-dir" in file.read().split(b"\\0"):
                    judge(True)
        judge(False)
        """),
        Outside(),
    ),
    Attack(
        "the server's memory",
        "learns the token",
        python("""
        needle = b"s3cret-of-the-" + b"host"
        own = {str(os.getpid()), str(os.getppid())}
        for process in {os.environ["SERVER_PID"], *filter(str.isdigit, os.listdir("/proc"))} - own:
            try:
                with open(f"/proc/{process}/maps") as maps, open(f"/proc/{process}/mem", "rb", 0) as memory:
                    for line in maps:
                        start, end = (int(part, 16) for part in line.split()[0].split("-"))
                        if line.split()[1][0] != "r" or end - start > 2**26 or "[heap]" not in line and "[stack]" not in line:
                            continue
                        memory.seek(start)
                        judge(needle in memory.read(end - start), process)
            except OSError as error:
                judge(False, error)
        """),
        Outside(),
    ),
    Attack(
        "the server's memory by a system call",
        "learns the token",
        python("""
        libc.process_vm_readv.restype = ctypes.c_ssize_t
        class Part(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
        target = int(os.environ["CANARY"])
        buffer = ctypes.create_string_buffer(64)
        # Where the target has its stack is written in its own maps; any readable address shows that it can be read.
        try:
            address = next(int(line.split("-")[0], 16) for line in open(f"/proc/{target}/maps") if " r" in line)
        except OSError:
            address = 0x400000
        here, there = Part(ctypes.addressof(buffer), 64), Part(address, 64)
        got = libc.process_vm_readv(target, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        judge(got == 64, errno.errorcode.get(ctypes.get_errno()))
        """),
        Outside(),
    ),
    Attack(
        "the server's socket",
        "gives itself another slot",
        python("""
        client = socket.socket(socket.AF_UNIX)
        client.connect(os.environ["SERVER_SOCKET"])
        client.sendall(b"GET /slots HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        answer = b""
        while chunk := client.recv(4096):
            answer += chunk
        judge(b"200 OK" in answer, answer)
        """),
        Outside(),
    ),
    Attack(
        "a file descriptor of the init",
        "answers in the init's name",
        on_init("""
        pidfd = syscall("pidfd_open", victim, 0)[0]
        for number in range(3, 12):
            result = syscall("pidfd_getfd", pidfd, number, 0)
            judge(result[0] >= 0, result)
        """),
        ON_AN_ORDINARY_PROCESS,
    ),
    Attack(
        "the init under a debugger",
        "runs code in the init",
        on_init("""
        PTRACE_SEIZE = 0x4206
        judge(libc.ptrace(PTRACE_SEIZE, victim, 0, 0) == 0, errno.errorcode.get(ctypes.get_errno()))
        """),
        ON_AN_ORDINARY_PROCESS,
    ),
    Attack(
        "the init's files",
        "reads the control socket's peer",
        on_init("""
        for name in ("environ", "mem", "maps", "fd/3", "cwd", "root", "exe"):
            try:
                path = f"/proc/{victim}/{name}"
                use = os.readlink if name in ("fd/3", "cwd", "root", "exe") else lambda path: open(path, "rb").read(0)
                use(path)
                os.listdir(f"/proc/{victim}/fd")
                judge(True, name)
            except OSError as error:
                judge(False, name, error)
        """),
        ON_AN_ORDINARY_PROCESS,
    ),
    Attack(
        "an end of the init",
        "closes the box under the server",
        on_init("""
        os.kill(victim, signal.SIGKILL); os.kill(victim, signal.SIGSTOP); os.kill(victim, signal.SIGTERM)
        time.sleep(0.1)
        state = open(f"/proc/{victim}/stat").read().rpartition(")")[2].split()[0]
        judge(state in "ZXTt", state)
        if victim != 1:
            started.kill()
        """),
        ON_AN_ORDINARY_PROCESS,
    ),
    Attack(
        "a signal to a process of the host", "ends the server", "kill -9 $CANARY; kill -9 -$CANARY; sleep 0.1", Outside(), kills
    ),
    Attack("a stop of a process of the host", "hangs the server", "kill -STOP $CANARY; sleep 0.1", Outside(), kills),
    Attack(
        "a handle of a process of the host",
        "ends the server",
        python("""
        handle = syscall("pidfd_open", int(os.environ["CANARY"]), 0)
        judge(handle[0] >= 0, handle)
        """),
        Outside(),
    ),
    Attack(
        "limits of a process of the host",
        "takes the server's descriptors",
        python("""
        try:
            resource.prlimit(int(os.environ["CANARY"]), resource.RLIMIT_NOFILE, (3, 3))
            judge(True)
        except (OSError, ProcessLookupError) as error:
            judge(False, error)
        """),
        Outside(),
    ),
    Attack(
        "a debugger on a process of the host",
        "takes the server over",
        python("""
        judge(libc.ptrace(0x4206, int(os.environ["CANARY"]), 0, 0) == 0, errno.errorcode.get(ctypes.get_errno()))
        """),
        Outside(),
    ),
    Attack(
        "priority of a process of the host",
        "starves the server",
        python("""
        try:
            os.setpriority(os.PRIO_PROCESS, int(os.environ["CANARY"]), 19)
            judge(True)
        except OSError as error:
            judge(False, error)
        """),
        Outside(),
    ),
    Attack(
        "an abstract socket",
        "talks to the host's services",
        python("""
        client = socket.socket(socket.AF_UNIX)
        client.connect("\\0" + os.environ["ABSTRACT_SOCKET"])
        print(client.recv(100).decode())
        """),
        BoxWithout(("--unshare-net",)),
        leaks,
    ),
    Attack(
        "the host's mounts",
        "reads the data of all slots",
        "ls $DATA_DIR/slots/slot_1/front $DATA_DIR/layers && echo BREACH",
        Outside(),
    ),
    Attack(
        "a module in the server's way",
        "runs code in the server",
        "for d in $DATA_DIR $DATA_DIR/slots $DATA_DIR/slots/slot_0 $DATA_DIR/slots/slot_0/front; "
        "do echo x > $d/asyncio.py && echo BREACH; rm -f $d/asyncio.py; done",
        Outside(),
    ),
]


@each(ATTACKS)
async def test_attack(field: Field, attack: Attack) -> None:
    await hold(field, attack)


async def test_a_kill_of_the_own_group(field: Field) -> None:
    """`kill 0` reaches the process group, and that may reach beyond the PID namespace."""
    command, environment = BoxWithout(("--new-session",)).command(field, "kill -9 0")
    start_of_box = command.index(field.box()[0][0])
    group = [*command[:start_of_box], "sh", "-c", 'sleep 1000 & echo $!; "$@"; echo survived', "sh", *command[start_of_box:]]
    bystander = await asyncio.create_subprocess_exec(
        *group, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        said = (await asyncio.wait_for(bystander.communicate(), PATIENCE_S))[0].split()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(bystander.pid, signal.SIGKILL)
    assert len(said) == 1
    assert eventually(lambda: not alive(int(said[0])))
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        assert (await api.bash("kill -9 0"))["metadata"]["exit_code"] == 137
        assert not (await api.bash("sleep 60 & kill -9 -1; wait $!"))["success"]
    await still_works(field)


async def test_the_terminal_of_whoever_started_the_server(field: Field) -> None:
    """A controlling terminal could be written to, and where the kernel allows it be typed into."""
    type_in = python(
        """
        try:
            terminal = os.open("/dev/tty", os.O_RDWR)
            os.write(terminal, b"shown to the user")
            judge(True)
        except OSError as error:
            judge(False, error)
        """
    )
    with terminal() as (master, slave):
        command, environment = BoxWithout(("--new-session",)).command(field, type_in)
        control = await asyncio.create_subprocess_exec(
            "setsid", "--ctty", *command, env=environment, stdin=slave, stdout=subprocess.PIPE
        )
        assert b"BREACH" in (await asyncio.wait_for(control.communicate(), PATIENCE_S))[0]
        assert b"shown to the user" in os.read(master, 1000)
    with open_directory() as directory, terminal() as (master, slave):
        server = launch(["setsid", "--ctty", sys.executable, *server_command(directory)], directory, stdin=slave)
        api = Api.over(server)
        async with api.session:
            assert (await api.output(type_in)).startswith("HELD")
        assert server.stop() == 0
        server.process.stdout.close()  # type: ignore[union-attr]
        os.set_blocking(master, False)
        with suppress(BlockingIOError):
            assert os.read(master, 1000) == b""


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(slave)
        os.close(master)


FORGE = python(
    """
    sent = 0
    for name in os.listdir("/proc/self/fd"):
        for number in range(1, 50):
            packet = b"exit\\0%d\\x000" % number
            try:
                sent += socket.socket(fileno=os.dup(int(name))).send(packet) if int(name) > 2 else 0
            except OSError:
                pass
    judge(sent)
    """
)


async def test_an_answer_in_the_name_of_the_init(field: Field) -> None:
    """Whoever holds an end of the control socket says how a command ended."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        os.set_inheritable(theirs.fileno(), True)
        control = await asyncio.create_subprocess_exec(
            "sh", "-c", FORGE, pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert b"BREACH" in (await asyncio.wait_for(control.communicate(), PATIENCE_S))[0]
        assert ours.recv(100).startswith(b"exit\0")
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        result = await api.bash(FORGE + "\nexit 7")
        assert result["output"].startswith("HELD")
        assert result["metadata"]["exit_code"] == 7
        # What a command prints is never taken for a message.
        result = await api.bash(
            "for n in 1 2 3 4 5 6; do printf 'exit\\000%d\\0000' $n; printf 'exit\\000%d\\0000' $n >&2; done; exit 9"
        )
        assert result["metadata"]["exit_code"] == 9


async def test_the_servers_port(field: Field) -> None:
    """The API is one connection away from whoever reaches the host's loopback."""
    ask = python(
        """
        client = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), 2)
        client.sendall(b"GET /slots HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        judge(b"HTTP/1.1" in client.recv(4096))
        """
    )
    with field_of("--port", "0", other_user=field.other_user) as listening:
        port = listening.server.ready["port"]
        await hold(
            listening, Attack("the server's port", "uses the API", f"export PORT={port}; {ask}", BoxWithout(("--unshare-net",)))
        )


async def test_the_token() -> None:
    """Nothing but the token opens a door, and nothing that a caller or a slot sees tells it."""
    token = secrets.token_hex(16)
    with open_directory() as directory:
        (directory / "token").write_text(token)
        (directory / "token").chmod(0o600)
        with field_of("--token-file", str(directory / "token")) as field:
            near = [
                *({"Authorization": value} for value in ("", "Bearer", "Bearer ", token, f"Basic {token}", f"bearer {token}")),
                *(
                    {"Authorization": f"Bearer {value}"}
                    for value in (token[:-1], f"{token}0", f" {token}", f"{token.upper()}x")
                ),
                {"X-Authorization": f"Bearer {token}"},
                {"Cookie": f"Authorization=Bearer {token}"},
                {},
            ]
            connector = aiohttp.UnixConnector(field.server.socket)
            async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
                for headers in near:
                    for method, route in (("GET", "/slots"), ("POST", "/execute"), ("GET", f"/slots?token={token}")):
                        async with session.request(method, route, headers=headers) as answer:
                            assert answer.status == 401
                            assert token not in await answer.text()
                # The control: the same request with the right token.
                async with session.get("/slots", headers={"Authorization": f"Bearer {token}"}) as answer:
                    assert answer.status == 200
                search = {"command": f"cat {directory}/token /proc/*/environ /proc/*/cmdline"}
                body = {"slot_id": "slot_0", "tool": "bash", "args": search}
                async with session.post("/execute", json=body, headers={"Authorization": f"Bearer {token}"}) as answer:
                    assert (await answer.json())["output"].count(token) == 0
