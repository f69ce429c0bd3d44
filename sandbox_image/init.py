"""The process that lives in a box as its PID 1 and starts commands there.

Run as `python -I -S init.py CONTROL OUTPUT LIMITS`: two inherited file descriptors and resource limits, `NUMBER:VALUE,...`.
Needs the standard library and no other file of this package. Its working directory is the workspace, its environment that of
the commands. Where there is a C compiler, boxes run init.c instead, which does the same.

CONTROL is a SOCK_SEQPACKET socket. A packet is a list of byte strings without NUL, joined by NUL:

    init -> server   hello FACTS                             once, before anything else: see `facts`
    server -> init   run NUMBER CWD NAME=VALUE... COMMAND    CWD is relative to the workspace, empty for the workspace itself
    init -> server   exit NUMBER STATUS                      the command and its descendants are dead; 128 + N for signal N
                     error NUMBER TEXT                       it could not be started
    server -> init   kill NUMBER                             answered by `exit` as well
                     keep NUMBER CWD NAME=VALUE... COMMAND   as `run`, but the command goes on beside others until it ends; its
                                                             descriptors 0, 1, 2... come with the packet
                     interrupt NUMBER                        SIGINT to the process group of a kept command
                     enter NUMBER PATH                       the workspace is now at PATH
                     listen NUMBER PORT                      listen on 127.0.0.1; the socket comes with the answer
    init -> server   done NUMBER                             the answer to `keep`, `enter` and `listen` if it is not `error`

A message that is too large for a packet lies in a file, which comes as the first descriptor of the packet `@`.

OUTPUT is the write end of a pipe for the output of `run`. A kept command has a keeper, a child subreaper that adopts the
orphans among its descendants: so they are told apart from processes that a `run` has left behind. Without a PID namespace (no
isolation) the init is a child subreaper as well, so that it can still find and kill all of its descendants.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

PACKET_BYTES = 16384
BY_REFERENCE = b"@"
# The kernel takes 128 KiB per argument (MAX_ARG_STRLEN), the terminating NUL included.
LONGEST_ARGUMENT = 128 * 1024 - 1
SCRIPT_FD = 3
MOST_KEPT = 8
MOST_DESCRIPTORS = 16
MOST_PASSES = 500
PASS_PAUSE_S = 0.001
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
SIOCGIFFLAGS = 0x8913
IFF_UP = 1
NAMESPACES = ("user", "pid", "net", "ipc", "uts", "mnt", "cgroup")
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)

Actions = tuple[Any, ...]


@dataclass
class Child:
    """A process that was started for the server: the running command, or the keeper of a kept one."""

    pid: int
    number: bytes
    status: int | None = None


class Init:
    """Starts one command at a time, beside kept ones, and kills what a command leaves behind."""

    def __init__(self, control: socket.socket, output: int) -> None:
        self._control = control
        self._output = output
        self._workspace = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        self._environment = dict(os.environb)
        null_input = os.open("/dev/null", os.O_RDONLY)
        self._streams = _as_descriptors([null_input, output, output])
        # Resolved once: /bin and sh are links.
        self._shell = os.path.realpath("/bin/sh")
        self._alone = os.getpid() == 1
        self._command: Child | None = None
        self._kept: list[Child] = []
        self._woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._events = select.poll()
        self._events.register(control, select.POLLIN)
        self._events.register(self._woken, select.POLLIN)

    def serve(self) -> NoReturn:
        """Obey the server until the connection ends."""
        while True:
            for descriptor, _ in self._events.poll():
                if descriptor == self._woken:
                    os.read(self._woken, 4096)
                    self._reap(os.WNOHANG)
                    self._settle()
                else:
                    self._obey(*self._receive())

    def send(self, *parts: bytes) -> None:
        """Send a message to the server."""
        self._control.send(b"\0".join(parts))

    def _obey(self, order: list[bytes], descriptors: list[int]) -> None:
        kind, number, *rest = order
        if kind == b"run":
            self._run(number, rest[0], rest[1:-1], rest[-1])
        elif kind == b"keep":
            self._keep(number, rest[0], rest[1:-1], rest[-1], descriptors)
        elif kind in (b"kill", b"interrupt"):
            self._signal(number, signal.SIGKILL if kind == b"kill" else signal.SIGINT)
        elif kind == b"enter":
            self._enter(number, rest[0])
        elif kind == b"listen":
            self._listen(number, int(rest[0]))

    def _receive(self) -> tuple[list[bytes], list[int]]:
        packet, attached, _, _ = socket.recv_fds(self._control, PACKET_BYTES, MOST_DESCRIPTORS)
        for descriptor in attached:
            # Not by MSG_CMSG_CLOEXEC: recv_fds ignores its flags in some versions of Python.
            os.set_inheritable(descriptor, False)
        if packet == BY_REFERENCE and attached:
            with open(attached.pop(0), "rb") as file:
                # The descriptors share the position, which is at the end after the writing.
                file.seek(0)
                packet = file.read()
        if not packet:
            self._leave()
        return packet.split(b"\0"), attached

    def _leave(self) -> NoReturn:
        self._kill_everybody()
        sys.exit(0)

    def _run(self, number: bytes, cwd: bytes, variables: list[bytes], command: bytes) -> None:
        # An earlier command may have made the pipe non-blocking, as Node.js does; the open file description is shared.
        fcntl.fcntl(self._output, fcntl.F_SETFL, 0)
        try:
            if len(command) > LONGEST_ARGUMENT:
                with open(os.memfd_create("command"), "wb") as script:
                    script.write(command)
                    script.flush()
                    attach = (os.POSIX_SPAWN_DUP2, script.fileno(), SCRIPT_FD)
                    pid = self._start(cwd, variables, ("sh", f"/dev/fd/{SCRIPT_FD}"), (*self._streams, attach))
            else:
                pid = self._start(cwd, variables, ("sh", "-c", command), self._streams)
        except OSError as error:
            self._clear()
            self._fail(number, error)
            return
        self._command = Child(pid, number)

    def _start(self, cwd: bytes, variables: list[bytes], argv: tuple[str | bytes, ...], actions: Actions) -> int:
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

    def _keep(self, number: bytes, cwd: bytes, variables: list[bytes], command: bytes, descriptors: list[int]) -> None:
        try:
            if len(self._kept) >= MOST_KEPT:
                raise BlockingIOError(0, "too many kept commands")
            if cwd:
                # Checked here, because the keeper cannot report an error.
                os.close(os.open(cwd, os.O_PATH | os.O_DIRECTORY))
            # The keeper must not handle an interrupt before it knows the shell to pass it on to.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            pid = os.fork()
            if pid == 0:
                self._be_keeper(cwd, variables, command, descriptors)
        except OSError as error:
            self._fail(number, error)
        else:
            self._kept.append(Child(pid, number))
            self.send(b"done", number, b"")
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            for descriptor in descriptors:
                os.close(descriptor)

    def _be_keeper(self, cwd: bytes, variables: list[bytes], command: bytes, descriptors: list[int]) -> NoReturn:
        """Become the child subreaper of a kept command, and end with its exit status."""
        code = 125
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            shell = self._start(cwd, variables, ("sh", "-c", command), _as_descriptors(descriptors))
            signal.signal(signal.SIGINT, lambda number, frame: os.killpg(shell, number))
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            os.closerange(0, os.sysconf("SC_OPEN_MAX"))
            pid, status = os.waitpid(-1, 0)
            while pid != shell:
                pid, status = os.waitpid(-1, 0)
            code = _exit_status(status)
        finally:
            # This is a fork: the code of the callers is for the parent alone.
            os._exit(code)

    def _signal(self, number: bytes, kind: signal.Signals) -> None:
        # The command may have ended while the order was on its way.
        for child in self._children():
            if child.number == number and child.status is None and not (child is self._command and kind == signal.SIGINT):
                os.kill(child.pid, kind)

    def _enter(self, number: bytes, path: bytes) -> None:
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            os.fchdir(directory)
            if not os.access(".", os.W_OK):
                raise PermissionError(0, f"{os.fsdecode(path)} cannot be written")
        except OSError as error:
            self._fail(number, error)
            return
        os.close(self._workspace)
        self._workspace = directory
        self.send(b"done", number, b"")

    def _listen(self, number: bytes, port: int) -> None:
        try:
            listening = socket.create_server(("127.0.0.1", port), backlog=64)
        except OSError as error:
            self._fail(number, error)
            return
        with listening:
            socket.send_fds(self._control, [b"\0".join((b"done", number, b""))], [listening.fileno()])

    def _fail(self, number: bytes, error: OSError) -> None:
        self.send(b"error", number, str(error.strerror).encode())

    def _settle(self) -> None:
        """Report the commands that have ended, after the processes that they left behind have been killed."""
        command = self._command
        if command is not None:
            if command.status is None:
                return
            self._clear()
            self._command = None
            self.send(b"exit", command.number, b"%d" % _exit_status(command.status))
        elif any(child.status is not None for child in self._kept):
            self._clear()
        for child in [child for child in self._kept if child.status is not None]:
            self._kept.remove(child)
            self.send(b"exit", child.number, b"%d" % _exit_status(child.status or 0))

    def _children(self) -> list[Child]:
        return self._kept if self._command is None else [self._command, *self._kept]

    def _reap(self, flags: int) -> None:
        try:
            pid, status = os.waitpid(-1, flags)
            while pid:
                for child in self._children():
                    if child.pid == pid:
                        child.status = status
                pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return

    def _clear(self) -> None:
        """Kill all processes but kept ones; if that does not succeed, because others fork too fast, kill those as well."""
        if any(child.status is None for child in self._kept):
            for number in range(MOST_PASSES):
                if not self._kill_strangers():
                    return
                self._reap(os.WNOHANG)
                if number:
                    time.sleep(PASS_PAUSE_S)
        self._kill_everybody()

    def _kill_strangers(self) -> bool:
        """Kill all processes that do not descend from a keeper; whether there were any."""
        keepers = {child.pid for child in self._kept if child.status is None}
        strangers = descendants(os.getpid(), spare=keepers)
        for pid in strangers:
            _kill(pid)
        return bool(strangers)

    def _kill_everybody(self) -> None:
        while _has_children() if not self._alone else _exists_anybody():
            for pid in [-1] if self._alone else descendants(os.getpid()):
                _kill(pid)
            self._reap(0)


def _as_descriptors(sources: list[int]) -> Actions:
    """Spawn actions that make these descriptors 0, 1, 2... of a process."""
    # Duplicated first: one of them may have the number that another one is to get.
    above = [fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, MOST_DESCRIPTORS) for source in sources]
    return tuple((os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(above))


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _exists_anybody() -> bool:
    """Whether there are other processes than PID 1, zombies included."""
    try:
        os.kill(-1, 0)
    except ProcessLookupError:
        return False
    return True


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def descendants(ancestor: int, spare: set[int] | frozenset[int] = frozenset()) -> list[int]:
    """The descendants of a process, as `/proc` shows them, without those of `spare` and their descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                line = file.read()
        except OSError:
            continue
        # The command name is in brackets and may contain anything, brackets and spaces included.
        parent = int(line[line.rindex(b")") + 2 :].split()[1])
        children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    pending = [ancestor]
    while pending:
        below = [pid for pid in children.get(pending.pop(), []) if pid not in spare]
        found += below
        pending += below
    return found


def facts() -> bytes:
    """What the server checks before it uses a box: `/proc/self/status`, and more lines of that form.

    `Box-Writable` lists directories that are writable and should not be, `Box-Workspace` is 1 if the workspace is writable,
    `Box-Interfaces` lists the network interfaces, with `+` if they are up and `-` if not, `Namespace-...` name its namespaces.
    """
    with open("/proc/self/status", "rb") as file:
        status = file.read()
    interfaces = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("16sh14x", name.encode(), 0)
            up = struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, request))[1] & IFF_UP
            interfaces.append(f"{name}{'+' if up else '-'}")
    lines = {
        "Box-Writable": " ".join(path for path in ("/", "/usr", "/etc", "/dev") if os.access(path, os.W_OK)),
        "Box-Workspace": str(int(os.access(".", os.W_OK))),
        "Box-Interfaces": " ".join(interfaces),
        **{f"Namespace-{name}": os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES},
    }
    return status + "".join(f"{name}:\t{value}\n" for name, value in lines.items()).encode()


def main(control_fd: int, output: int, limits: str) -> NoReturn:
    """Set the limits, report, and serve."""
    # PID 1 gets from its own namespace only signals that it handles, and Python handles this one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.umask(0o022)
    for kind, value in (map(int, limit.split(":")) for limit in limits.split(",")):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    for descriptor in (control_fd, output):
        os.set_inheritable(descriptor, False)
    control = socket.socket(fileno=control_fd)
    report = facts()
    libc = ctypes.CDLL(None, use_errno=True)
    # Commands run as the same user: without this they could trace this process, or take the control socket and forge replies.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getpid() != 1:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    init = Init(control, output)
    init.send(b"hello", report)
    init.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
