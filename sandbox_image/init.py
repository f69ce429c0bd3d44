"""The process that lives in a box as its PID 1 and starts commands there.

Run as `python -I -S init.py CONTROL OUTPUT LIMITS`: two inherited file descriptors and a JSON object of resource limits.
Needs the standard library only and works as a lone copy of this file. Its working directory is the workspace, its environment
is what commands get.

CONTROL is a SOCK_SEQPACKET socket; one packet is one JSON object. A packet `@` stands for an object that is too large for a
packet; it lies in the file that came with it.

    init -> server   {"hello": facts}                  once, before anything else
    server -> init   {"run": id, "command", "cwd", "env"}
    init -> server   {"done": id, "exit": status}      the command and all that it started are dead
                     {"done": id, "error": text}       it could not be started
    server -> init   {"kill": id}                      answered by `done` as well

OUTPUT is the write end of a pipe for what commands print. Without a PID namespace (no isolation) the process adopts orphans as
a "child subreaper", so that it can still find and kill everything that a command left behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

PACKET_BYTES = 65536
BY_REFERENCE = b"@"
# The kernel takes 128 KiB per argument (MAX_ARG_STRLEN), the terminating NUL included.
LONGEST_ARGUMENT = 128 * 1024 - 1
SCRIPT_FD = 3
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
SIOCGIFFLAGS = 0x8913
IFF_UP = 1


class Init:
    """Starts one command at a time and leaves nothing of it behind."""

    def __init__(self, control: socket.socket, output: int) -> None:
        self._control = control
        self._output = output
        self._workspace = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        self._environment = dict(os.environ)
        self._alone = os.getpid() == 1
        self._events = select.poll()
        self._events.register(control, select.POLLIN)

    def serve(self) -> NoReturn:
        """Answer the server until it is gone."""
        while True:
            message = self._receive()
            # A `kill` that crossed the `done` of its command on the way has nothing left to do.
            if "run" in message:
                self._run(message)

    def send(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())

    def _receive(self) -> dict[str, Any]:
        packet, attached, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            self._leave()
        if packet == BY_REFERENCE:
            with open(attached[0], "rb") as file:
                packet = file.read()
        message: dict[str, Any] = json.loads(packet)
        return message

    def _leave(self) -> NoReturn:
        self._clear(0)
        sys.exit(0)

    def _run(self, message: dict[str, Any]) -> None:
        call = message["run"]
        try:
            pid = self._spawn(message["command"], message["cwd"], message["env"])
        except (OSError, ValueError) as error:
            self._clear(0)
            self.send({"done": call, "error": getattr(error, "strerror", None) or str(error)})
            return
        status = self._wait(pid, call)
        killed = self._clear(pid)
        code = os.waitstatus_to_exitcode(killed if status is None else status)
        self.send({"done": call, "exit": code if code >= 0 else 128 - code})

    def _spawn(self, command: str, cwd: str | None, extra: dict[str, str] | None) -> int:
        # An earlier command may have made the pipe non-blocking, as Node.js does; that is a property of the pipe's open end.
        fcntl.fcntl(self._output, fcntl.F_SETFL, 0)
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, self._output, 1),
            (os.POSIX_SPAWN_DUP2, self._output, 2),
        ]
        text = command.encode("utf-8", "surrogateescape")
        argv: list[bytes | str] = ["sh", "-c", text]
        script = None
        try:
            if len(text) > LONGEST_ARGUMENT:
                script = os.memfd_create("command")
                with open(script, "wb", closefd=False) as file:
                    file.write(text)
                actions.append((os.POSIX_SPAWN_DUP2, script, SCRIPT_FD))
                argv = ["sh", f"/dev/fd/{SCRIPT_FD}"]
            if cwd is not None:
                os.chdir(cwd)
            return os.posix_spawn(
                "/bin/sh",
                argv,
                {**self._environment, **extra} if extra else self._environment,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                # Python ignores these two, and what is ignored stays so across exec.
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        finally:
            if cwd is not None:
                os.fchdir(self._workspace)
            if script is not None:
                os.close(script)

    def _wait(self, pid: int, call: int) -> int | None:
        """Wait for the command itself; None if it is to be killed."""
        ended = os.pidfd_open(pid)
        self._events.register(ended, select.POLLIN)
        try:
            while True:
                for descriptor, _ in self._events.poll():
                    if descriptor == ended:
                        return os.waitpid(pid, 0)[1]
                    if self._receive().get("kill") == call:
                        return None
        finally:
            self._events.unregister(ended)
            os.close(ended)

    def _clear(self, main: int) -> int:
        """Kill and reap everything there is, and return the wait status of `main`."""
        status = 0
        while True:
            self._kill_all()
            try:
                pid, result = os.waitpid(-1, 0)
                while pid:
                    if pid == main:
                        status = result
                    pid, result = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return status

    def _kill_all(self) -> None:
        if self._alone:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                return
            return
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def descendants(ancestor: int) -> list[int]:
    """The processes below one, as `/proc` shows them at this moment."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                line = file.read()
        except OSError:
            continue
        # The command name is in brackets and may hold anything, brackets and spaces included.
        parent = int(line[line.rindex(b")") + 2 :].split()[1])
        children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    pending = [ancestor]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def facts() -> dict[str, Any]:
    """What the server checks before it trusts a box."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    interfaces = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("16sh14x", name.encode(), 0)
            interfaces[name] = bool(struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, request))[1] & IFF_UP)
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "pid_namespace": os.readlink("/proc/self/ns/pid"),
        "capabilities": int(status["CapEff"], 16),
        "no_new_privileges": status["NoNewPrivs"] == "1",
        "interfaces": interfaces,
        "writable": [path for path in ("/", "/usr", "/etc", "/dev") if os.access(path, os.W_OK)],
        "workspace_writable": os.access(".", os.W_OK),
    }


def main(control_fd: int, output: int, limits: dict[str, int]) -> NoReturn:
    """Close the door behind us, report, and serve."""
    # PID 1 gets no signal from inside of its namespace that it has no handler for, and Python has one for this.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.umask(0o022)
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    for descriptor in (control_fd, output):
        os.set_inheritable(descriptor, False)
    control = socket.socket(fileno=control_fd)
    report = facts()
    libc = ctypes.CDLL(None, use_errno=True)
    # Commands run as the same user: without this they could trace us, or take the control socket and answer in our name.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if report["pid"] != 1:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    init = Init(control, output)
    init.send({"hello": report})
    init.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
