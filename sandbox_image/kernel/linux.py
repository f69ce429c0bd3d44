"""System calls that Python has no function for: mounts, namespaces, and a little about processes and pipes."""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000

_MNT_DETACH = 0x2
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE = 428
_OPEN_TREE_CLONE = 0x1
_MOVE_MOUNT = 429
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOUNT_SETATTR = 442
_MOUNT_ATTR_IDMAP = 0x00100000

_HIGHEST_PRIORITY = -20
_CPUCLOCK_SCHED = 2
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION = 0x20080522
_FILE_CAPABILITIES = (1, 2, 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapabilitySet(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


_CapabilitySets = _CapabilitySet * 2


@contextmanager
def rights(*, inherited: bool = False) -> Iterator[None]:
    """Put the capabilities that an ordinary user got by `enter_own_mounts` into effect, for this thread.

    With `inherited`, processes that are started meanwhile get the capabilities that override file permissions.
    """
    permitted = 0 if os.geteuid() == 0 else _capabilities()[0].permitted
    if not permitted:
        # Root's are always in effect, and a user outside of such a namespace has none.
        yield
        return
    _use_capabilities(True, sum(1 << number for number in _FILE_CAPABILITIES) if inherited else 0)
    try:
        for number in _FILE_CAPABILITIES if inherited else ():
            _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0), "prctl")
        yield
    finally:
        _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        _use_capabilities(False, 0)


def _capabilities() -> ctypes.Array[_CapabilitySet]:
    sets = _CapabilitySets()
    _check(_libc.capget(ctypes.byref(_CapabilityHeader(_CAPABILITY_VERSION, 0)), sets), "capget")
    return sets


def _use_capabilities(effective: bool, inheritable: int) -> None:
    sets = _capabilities()
    for part in sets:
        part.effective = part.permitted if effective else 0
        part.inheritable = 0
    sets[0].inheritable = inheritable
    _check(_libc.capset(ctypes.byref(_CapabilityHeader(_CAPABILITY_VERSION, 0)), sets), "capset")


def unshare(flags: int) -> None:
    """unshare(2): enter new namespaces. Raises `OSError`."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    """mount(2). Raises `OSError`."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    with rights():
        _check(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {kind or source} at {target}")


def unmount(target: str) -> None:
    """umount2(2) with MNT_DETACH: the mount disappears at once and is freed after its last use. Raises `OSError`."""
    with rights():
        _check(_libc.umount2(os.fsencode(target), _MNT_DETACH), f"unmount {target}")


def mount_id_mapped(source: str, target: str, user_namespace: int) -> None:
    """Mount a directory a second time, at `target`, with its owners mapped (mount_setattr(2), MOUNT_ATTR_IDMAP).

    The owner on disk is taken as a user inside of the namespace; at `target` the file belongs to the user outside that it is
    mapped to. Needs Linux 5.12 and support by the file system.

    Raises:
        OSError: the kernel or the file system cannot do this.
    """
    tree = _check(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC), "open_tree")
    try:
        attributes = _MountAttributes(_MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
        size = ctypes.sizeof(attributes)
        _check(_libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size), "mount_setattr")
        flags = _MOVE_MOUNT_F_EMPTY_PATH
        _check(_libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), flags), f"mount {source} at {target}")
    finally:
        os.close(tree)


def user_namespace(users: dict[int, int]) -> int:
    """A descriptor of a new user namespace without processes; `users` maps users and groups, inside -> outside.

    Must be called before there is a second thread.

    Raises:
        OSError: user namespaces are not available, or not to this user.
    """
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"-" if _libc.unshare(CLONE_NEWUSER) else b"+")
        os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        mapping = "".join(f"{inside} {outside} 1\n" for inside, outside in users.items())
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{name}", "w", encoding="ascii") as file:
                file.write(mapping)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (*ready, *go):
            os.close(descriptor)


def schedule_first(pid: int) -> None:
    """Give a process the highest priority, if this process may; the children of that process get the usual one."""
    with suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, pid, _HIGHEST_PRIORITY)


def processor_time(pid: int) -> float:
    """The processor time that a process has used, in seconds. Raises `OSError` if it is gone."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def bytes_in_pipe(descriptor: int) -> int:
    """How many bytes can be read from a pipe now (FIONREAD)."""
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


def enter_own_mounts() -> None:
    """Enter a new mount namespace, with this process and those that it starts from now on.

    Mounts of the host still propagate into it, its own mounts do not propagate out, and they vanish with the last process in
    it. An ordinary user enters a user namespace as well, in which the user keeps the same id; programs that are executed there
    have no more rights than before. Must be called before there is a second thread.

    Raises:
        OSError: it is not allowed.
    """
    if os.geteuid() == 0:
        unshare(CLONE_NEWNS)
    else:
        user, group = os.geteuid(), os.getegid()
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        _use_capabilities(False, 0)
    mount("none", "/", None, MS_REC | MS_SLAVE)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
