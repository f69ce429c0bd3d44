"""The process that lives in a box as its PID 1 and starts commands there.

Run as `python -I -S init.py CONTROL OUTPUT LIMITS`: two inherited file descriptors and a JSON object of resource limits.
Needs the standard library only and works as a lone copy of this file. Its working directory is the workspace, its environment
is what commands get.

CONTROL is a SOCK_SEQPACKET socket. A packet is a list of byte strings with a NUL between each two; none of them can hold one:

    init -> server   hello FACTS                          once, before anything else; FACTS is JSON
    server -> init   run NUMBER CWD NAME=VALUE... COMMAND  CWD is relative to the workspace, empty for the workspace itself
    init -> server   exit NUMBER STATUS                   the command and all that it started are dead; 128 + N for signal N
                     error NUMBER TEXT                    it could not be started
    server -> init   kill NUMBER                          answered by `exit` as well

A message that is too large for a packet is announced by the packet `@` and lies in the file that comes with the next one.

Where the compiled loop is in the box (init_loop.c), this program becomes it after the report.

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

PACKET_BYTES = 16384
BY_REFERENCE = b"@"
COMPILED_LOOP = "/init_loop"
# The kernel takes 128 KiB per argument (MAX_ARG_STRLEN), the terminating NUL included.
LONGEST_ARGUMENT = 128 * 1024 - 1
SCRIPT_FD = 3
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
SIOCGIFFLAGS = 0x8913
IFF_UP = 1
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class Init:
    """Starts one command at a time and leaves nothing of it behind."""

    def __init__(self, control: socket.socket, output: int) -> None:
        self._control = control
        self._output = output
        self._workspace = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        self._environment = dict(os.environb)
        self._streams = (
            (os.POSIX_SPAWN_DUP2, os.open("/dev/null", os.O_RDONLY), 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        )
        # Found once: /bin is a link, and so is sh.
        self._shell = os.path.realpath("/bin/sh")
        self._alone = os.getpid() == 1
        self._events = select.poll()
        self._events.register(control, select.POLLIN)

    def serve(self) -> NoReturn:
        """Answer the server until it is gone."""
        while True:
            kind, number, *rest = self._receive()
            # A `kill` that crossed the `exit` of its command on the way has nothing left to do.
            if kind == b"run":
                self._run(number, rest[0], rest[1:-1], rest[-1])

    def send(self, *parts: bytes) -> None:
        """Tell the server something."""
        self._control.send(b"\0".join(parts))

    def _receive(self) -> list[bytes]:
        packet = self._control.recv(PACKET_BYTES)
        if packet == BY_REFERENCE:
            _, attached, _, _ = socket.recv_fds(self._control, 1, 1, socket.MSG_CMSG_CLOEXEC)
            with open(attached[0], "rb") as file:
                packet = file.read()
        if not packet:
            self._leave()
        return packet.split(b"\0")

    def _leave(self) -> NoReturn:
        self._clear(0)
        sys.exit(0)

    def _run(self, number: bytes, cwd: bytes, variables: list[bytes], command: bytes) -> None:
        try:
            pid = self._spawn(cwd, variables, command)
        except OSError as error:
            self._clear(0)
            self.send(b"error", number, str(error.strerror).encode())
            return
        status = self._wait(pid, number)
        killed = self._clear(pid)
        code = os.waitstatus_to_exitcode(killed if status is None else status)
        self.send(b"exit", number, b"%d" % (code if code >= 0 else 128 - code))

    def _spawn(self, cwd: bytes, variables: list[bytes], command: bytes) -> int:
        # An earlier command may have made the pipe non-blocking, as Node.js does; that is a property of the pipe's open end.
        fcntl.fcntl(self._output, fcntl.F_SETFL, 0)
        if len(command) > LONGEST_ARGUMENT:
            with open(os.memfd_create("command"), "wb") as script:
                script.write(command)
                script.flush()
                attach = (os.POSIX_SPAWN_DUP2, script.fileno(), SCRIPT_FD)
                return self._start(cwd, variables, ("sh", f"/dev/fd/{SCRIPT_FD}"), (*self._streams, attach))
        return self._start(cwd, variables, ("sh", "-c", command), self._streams)

    def _start(self, cwd: bytes, variables: list[bytes], argv: tuple[str | bytes, ...], actions: tuple[Any, ...]) -> int:
        environment = self._environment
        if variables:
            environment = {**environment, **dict(variable.split(b"=", 1) for variable in variables)}
        if cwd:
            os.chdir(cwd)
        try:
            # Python ignores SIGPIPE and SIGXFSZ, and what is ignored stays so across exec.
            return os.posix_spawn(
                self._shell, argv, environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_IGNORED_BY_PYTHON
            )
        finally:
            if cwd:
                os.fchdir(self._workspace)

    def _wait(self, pid: int, number: bytes) -> int | None:
        """Wait for the command itself; None if it is to be killed."""
        ended = os.pidfd_open(pid)
        self._events.register(ended, select.POLLIN)
        try:
            while True:
                for descriptor, _ in self._events.poll():
                    if descriptor == ended:
                        return os.waitpid(pid, 0)[1]
                    if self._receive() == [b"kill", number]:
                        return None
        finally:
            self._events.unregister(ended)
            os.close(ended)

    def _clear(self, main: int) -> int:
        """Kill and reap everything there is, and return the wait status of `main`."""
        status = 0
        while self._kill_all():
            try:
                pid, result = os.waitpid(-1, 0)
                while pid:
                    if pid == main:
                        status = result
                    pid, result = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
        return status

    def _kill_all(self) -> bool:
        """Whether there was anybody, zombies included."""
        if self._alone:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                return False
            return True
        if not _has_children():
            return False
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return True


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


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
    init.send(b"hello", json.dumps(report).encode())
    if report["pid"] == 1:
        become_compiled(control_fd, output)
    init.serve()


def become_compiled(*descriptors: int) -> None:
    """Go on as the compiled loop; returns where there is none, or none that runs here."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    try:
        os.execve(COMPILED_LOOP, [COMPILED_LOOP, *map(str, descriptors)], os.environb)
    except OSError:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
