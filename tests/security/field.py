"""The field of the attacks: a slot server, and on the same machine what no slot may reach."""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sandbox_image.kernel.seccomp import filter_of_this_machine
from tests.sandbox_image.running import RunningServer, alive, command_line, open_directory, running

ENVIRONMENT_SECRET = "s3cret-of-the-host"
"""In the environment of every server that tests start."""


_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1


class Listener:
    """Tells a secret to whoever connects."""

    def __init__(self, listening: socket.socket, secret: str) -> None:
        self._listening = listening
        self._secret = secret.encode()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.sendall(self._secret)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


@dataclass
class Field:
    """A server and its surroundings; `grounds` is a directory that every user can pass."""

    server: RunningServer
    grounds: Path
    other_user: bool
    flag: str
    stack: ExitStack
    tcp_port: int
    abstract: str
    _canary: subprocess.Popen[bytes] | None = None
    _unisolated: RunningServer | None = None
    scratch: Iterator[int] = field(default_factory=lambda: iter(range(10**6)))

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never come out of a slot."""
        return (self.flag, ENVIRONMENT_SECRET)

    @property
    def victim(self) -> Path:
        """A file that everybody on the host may write."""
        return self.grounds / "victim"

    @property
    def shown(self) -> Path:
        """A tree that everybody on the host may write and boxes show read-only."""
        return self.grounds / "shown"

    def variables(self) -> dict[str, str]:
        """The environment of an attack: whatever an attacker might know or guess of the host."""
        return {
            "SECRET_FILE": str(self.grounds / "secret"),
            "VICTIM_FILE": str(self.victim),
            "GROUNDS": str(self.grounds),
            "SHOWN": str(self.shown),
            "UNIX_SOCKET": str(self.grounds / "listener"),
            "ABSTRACT_SOCKET": self.abstract,
            "TCP_PORT": str(self.tcp_port),
            "SERVER_SOCKET": self.server.socket,
            "SERVER_PID": str(self.server.process.pid),
            "DATA_DIR": str(self.server.data),
            "OTHER_WORKSPACE": str(self.server.workspace(1)),
            "CANARY": str(self.canary().pid),
        }

    @property
    def filter(self) -> Path:
        """A file with the filter of system calls that boxes have."""
        file = self.grounds / "filter"
        if not file.exists():
            file.write_bytes(filter_of_this_machine() or b"")
        return file

    def become_server_user(self) -> list[str]:
        """How a command line begins that runs as the server's user, in the server's view of the file system."""
        if os.geteuid() != 0:
            return []
        enter = ["nsenter", f"--mount=/proc/{self.server.process.pid}/ns/mnt"]
        return [*enter, *become(os.stat(f"/proc/{self.server.process.pid}").st_uid)]

    def canary(self) -> subprocess.Popen[bytes]:
        """A process of the server's user that should live on."""
        if self._canary is None:
            command = [*self.become_server_user(), "sleep", "1000"]
            self._canary = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        return self._canary

    def canary_runs(self) -> bool:
        """Whether it does."""
        pid = self.canary().pid
        return alive(pid) and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "Tt"

    def damaged(self) -> bool:
        """Whether something has been written outside of the slots, or removed there."""
        return not self.victim.exists() or self.victim.read_text() != "untouched" or bool(os.listdir(self.shown))

    def restore(self) -> None:
        """Make good what a control has done."""
        if self._canary is not None and not self.canary_runs():
            self.end_canary()
        self.victim.unlink(missing_ok=True)
        self.victim.write_text("untouched")
        self.victim.chmod(0o666)
        for name in os.listdir(self.shown):
            (self.shown / name).unlink()

    def end_canary(self) -> None:
        """Kill it."""
        if self._canary is not None:
            self._canary.kill()
            self._canary.wait()
            self._canary = None

    def unisolated(self) -> RunningServer:
        """A server of the same user whose slots have no box."""
        if self._unisolated is None:
            self._unisolated = self.stack.enter_context(running("--isolation", "none", other_user=self.other_user))
        return self._unisolated

    def box(self) -> tuple[list[str], dict[str, str], int]:
        """A running box of the server: bubblewrap's command line, its environment and its user."""
        for pid in self.server.processes():
            if os.path.basename(command_line(pid).split(" ")[0]) == "bwrap":
                arguments = [part.decode() for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
                pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")[:-1]
                return arguments, dict(pair.split("=", 1) for pair in pairs), os.stat(f"/proc/{pid}").st_uid
        raise AssertionError("the server has no box")

    def new_directory(self, owner: int | None) -> Path:
        """An empty directory for a control."""
        directory = self.grounds / f"control-{next(self.scratch)}"
        directory.mkdir(mode=0o755)
        if owner is not None and os.geteuid() == 0:
            os.chown(directory, owner, owner)
        return directory


def become(uid: int) -> list[str]:
    """How a command line begins that runs as this user and nobody else."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


@contextmanager
def field_of(*options: str, shown: Path | None = None, other_user: bool = False, slots: int = 2) -> Iterator[Field]:
    """A field, with one more tree that boxes show; afterwards nothing of it is left."""
    flag = f"flag-{secrets.token_hex(12)}"
    # Keys of a session go from a process to all that it starts, whoever they become.
    ctypes.CDLL(None).syscall(ctypes.c_long(_KEYCTL[os.uname().machine]), ctypes.c_long(_JOIN_SESSION_KEYRING), None)
    with ExitStack() as stack:
        grounds = stack.enter_context(open_directory())
        grounds.chmod(0o755)
        (grounds / "secret").write_text(flag)
        for name in ("shown", "home"):
            (grounds / name).mkdir()
            (grounds / name).chmod(0o777)
        listening = socket.create_server(("127.0.0.1", 0))
        abstract = f"field-{secrets.token_hex(8)}"
        hidden, named = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        hidden.bind(f"\0{abstract}")
        named.bind(str(grounds / "listener"))
        (grounds / "listener").chmod(0o777)
        for unix in (hidden, named):
            unix.listen()
        for socket_ in (listening, hidden, named):
            stack.enter_context(Listener(socket_, flag))
        trees = [part for tree in (grounds / "shown", shown) if tree is not None for part in ("--read-only", str(tree))]
        server = stack.enter_context(running(*trees, *options, other_user=other_user, slots=slots))
        made = Field(server, grounds, other_user, flag, stack, listening.getsockname()[1], abstract)
        made.restore()
        try:
            yield made
        finally:
            made.end_canary()
