"""Control groups: what all processes of a slot may use together, where the server may make groups.

Each slot has a group below one of the server's, in every hierarchy that has one of the controllers `CONTROLLERS`: version 1
(Documentation/admin-guide/cgroup-v1), version 2 (Documentation/admin-guide/cgroup-v2.rst) or a mixture of both. Slots share the
processor alike, however many processes one of them has.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CONTROLLERS = ("memory", "pids", "cpu")
_PREFIX = "hermes-envs-"
_SERVER = "server"
_PROCESSES = "cgroup.procs"
_ENABLED = "cgroup.subtree_control"
_CPU_SHARES, _CPU_WEIGHT, _MOST_CPU = 1024, 100, 10_000
_EVENTS_BYTES = 4096
_REMOVAL_S = 5.0
_RELEASE_S = 10.0
_RETRY_S = 0.01
_NO_SWAP_ACCOUNT = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP)
_LOG = logging.getLogger("sandbox_image")


@dataclass(frozen=True)
class GroupLimits:
    """What the processes of one slot may use together; files in memory count as memory."""

    memory_bytes: int
    processes: int


@dataclass(frozen=True)
class Hierarchy:
    """A tree of groups: the controllers that it has, and the group that the server is in."""

    version: int
    controllers: tuple[str, ...]
    top: Path
    group: Path

    @classmethod
    def find(cls, proc: Path = Path("/proc/self")) -> list[Hierarchy]:
        """All that have one of `CONTROLLERS`, as the files `mountinfo` and `cgroup` of a process tell it."""
        try:
            memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        except FileNotFoundError:
            # A kernel without control groups.
            return []
        found = []
        for line in (proc / "mountinfo").read_text().splitlines():
            place, _, kind = line.partition(" - ")
            if not kind.startswith("cgroup"):
                continue
            version = 2 if kind.startswith("cgroup2 ") else 1
            root, top = (_unescaped(path) for path in place.split()[3:5])
            names = [] if version == 2 else [name for name in kind.split()[2].split(",") if name in CONTROLLERS]
            for _, listed, path in memberships:
                if (version == 2 and listed == "") or set(names) & set(listed.split(",")):
                    inside = os.path.relpath(path, root)
                    group = Path(top) if inside.startswith("..") else Path(top, inside)
                    found.append(cls(version, tuple(names) or _offered(group), Path(top), group))
        return [hierarchy for hierarchy in found if hierarchy.controllers]


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _offered(group: Path) -> tuple[str, ...]:
    """The controllers that a group of version 2 can hand on."""
    try:
        offered = (group / "cgroup.controllers").read_text().split()
    except OSError:
        return ()
    return tuple(name for name in CONTROLLERS if name in offered)


@dataclass(frozen=True)
class SlotGroup:
    """The groups of one slot.

    `events` is open as long as the server lives: the file that counts processes which were killed for the memory limit.
    `memory` is the one of them that limits memory, with the version of its hierarchy.
    """

    directories: tuple[Path, ...] = ()
    events: int | None = None
    memory: tuple[int, Path] | None = None

    def add(self, pid: int) -> None:
        """Move a process here; what it starts from now on is here as well.

        Raises:
            OSError: it is gone, or the kernel refuses.
        """
        for directory in self.directories:
            _write(directory / _PROCESSES, str(pid))

    def limit_memory(self, size: int) -> None:
        """Change the memory limit, if there is one. Waits, blocking, until no more than that is in use.

        Raises:
            OSError: more stays in use, or the kernel refuses.
        """
        deadline = time.monotonic() + _RELEASE_S
        while self.memory is not None and not _fits(*self.memory, size):
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"more than {size} bytes of its memory stay in use")
            time.sleep(_RETRY_S)

    def kills(self) -> int | None:
        """How many processes were killed because the slot had no memory left; None where nothing tells."""
        if self.events is None:
            return None
        # Asked after every call: opening it each time takes nine times as long.
        words = os.pread(self.events, _EVENTS_BYTES, 0).split()
        return int(words[words.index(b"oom_kill") + 1]) if b"oom_kill" in words else None


@dataclass
class ControlGroups:
    """The groups of a server. `missing` says of each controller that cannot be used why."""

    limits: GroupLimits
    missing: dict[str, str]
    _own: list[tuple[Hierarchy, Path]] = field(default_factory=list)

    @classmethod
    def prepare(cls, found: Sequence[Hierarchy], record: Path, limits: GroupLimits, slots: int) -> ControlGroups:
        """Make the groups of a server and try them; where that fails, the controllers are missing and nothing is left.

        `record` is a file that is to name the server's groups, for `remove_recorded`.
        """
        groups = cls(limits, dict.fromkeys(CONTROLLERS, "the kernel offers no such controller here"))
        name = _PREFIX + secrets.token_hex(6)
        for hierarchy in found:
            own = hierarchy.group / name
            try:
                own = _base(hierarchy, name) / name
                with record.open("a") as file:
                    file.write(f"{own}\n")
                _make(hierarchy, own, limits, slots)
            except OSError as error:
                remove_group(own)
                reason = f"{own.parent}: {error.strerror}"
                groups.missing.update(dict.fromkeys(hierarchy.controllers, reason))
                continue
            groups._own.append((hierarchy, own))
            for controller in hierarchy.controllers:
                del groups.missing[controller]
        return groups

    def slot(self, index: int) -> SlotGroup:
        """The groups of a slot."""
        directories = tuple(_slot(own, index) for _, own in self._own)
        for hierarchy, own in self._own:
            if "memory" in hierarchy.controllers:
                group = _slot(own, index)
                events = group / ("memory.oom_control" if hierarchy.version == 1 else "memory.events")
                return SlotGroup(directories, os.open(events, os.O_RDONLY), (hierarchy.version, group))
        return SlotGroup(directories)

    @property
    def versions(self) -> dict[str, int]:
        """The controllers in use, each with the version of its hierarchy."""
        return {controller: hierarchy.version for hierarchy, _ in self._own for controller in hierarchy.controllers}


def _base(hierarchy: Hierarchy, name: str) -> Path:
    """The group below which the server makes its own."""
    if hierarchy.version == 1:
        return hierarchy.group
    group = hierarchy.group
    while True:
        if _hands_on(group, hierarchy.controllers) and os.access(group, os.W_OK):
            return group
        if group == hierarchy.top or _has_limit(group):
            break
        group = group.parent
    # In version 2 a group has either processes or groups with limits: the server makes room, if it is alone.
    group = hierarchy.group
    (group / name / _SERVER).mkdir(parents=True)
    _write(group / name / _SERVER / _PROCESSES, str(os.getpid()))
    _enable(group, hierarchy.controllers)
    return group


def _hands_on(group: Path, controllers: Sequence[str]) -> bool:
    return set(controllers) <= set((group / _ENABLED).read_text().split())


def _has_limit(group: Path) -> bool:
    """Whether somebody has limited this group: then what we start has to stay in it."""
    limit = group / "memory.max"
    return limit.exists() and limit.read_text().strip() != "max"


def _make(hierarchy: Hierarchy, own: Path, limits: GroupLimits, slots: int) -> None:
    own.mkdir(exist_ok=True)
    if hierarchy.version == 2:
        _enable(own, hierarchy.controllers)
    if "cpu" in hierarchy.controllers:
        # As much as the slots would get if each were an ordinary process.
        if hierarchy.version == 1:
            _write(own / "cpu.shares", str(_CPU_SHARES * slots))
        else:
            _write(own / "cpu.weight", str(min(_CPU_WEIGHT * slots, _MOST_CPU)))
    for index in range(slots):
        group = _slot(own, index)
        group.mkdir()
        if "memory" in hierarchy.controllers:
            _limit_memory(hierarchy.version, group, limits.memory_bytes)
        if "pids" in hierarchy.controllers:
            _write(group / "pids.max", str(limits.processes))
    _try(_slot(own, 0))


def _fits(version: int, group: Path, size: int) -> bool:
    """Set the limit; whether what is in use is within it. Version 1 refuses a limit that is too low, version 2 takes it."""
    try:
        _limit_memory(version, group, size)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return version == 1 or int((group / "memory.current").read_text()) <= size


def _limit_memory(version: int, group: Path, size: int) -> None:
    limit, swap = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if version == 1 else ("memory.max", "memory.swap.max")
    )
    # Version 1 counts memory and swap together, version 2 swap alone.
    values = [(limit, size), (swap, size if version == 1 else 0)]
    if version == 1 and size > int((group / limit).read_text()):
        # Both together are never less than memory.
        values.reverse()
    for name, value in values:
        try:
            _write(group / name, str(value))
        except OSError as error:
            if name != swap or error.errno not in _NO_SWAP_ACCOUNT:
                raise


def _try(group: Path) -> None:
    """Let a process go through a group: making a group may be allowed and moving a process refused."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        _write(group / _PROCESSES, str(process.pid))


def _slot(own: Path, index: int) -> Path:
    return own / f"slot_{index}"


def _enable(group: Path, controllers: Sequence[str], sign: str = "+") -> None:
    _write(group / _ENABLED, " ".join(sign + name for name in controllers))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def remove_recorded(record: Path) -> None:
    """Remove the groups that a server has named in a file, and then the file; nothing there is fine."""
    try:
        names = record.read_text().splitlines()
    except FileNotFoundError:
        return
    for name in names:
        if Path(name).name.startswith(_PREFIX):
            remove_group(Path(name))
    record.unlink()


def remove_group(group: Path) -> None:
    """End what is in a server's group and remove it; nothing there is fine."""
    if not group.is_dir():
        return
    if (group / "cgroup.kill").exists():
        for child in _children(group):
            if child.name != _SERVER:
                _write(child / "cgroup.kill", "1")
    deadline = time.monotonic() + _REMOVAL_S
    for child in _children(group):
        if child.name != _SERVER:
            _retry(child.rmdir, deadline)
    _move_back(group)
    for last in (*_children(group), group):
        _retry(last.rmdir, deadline)


def _children(group: Path) -> list[Path]:
    return [path for path in group.iterdir() if path.is_dir()]


def _move_back(group: Path) -> None:
    """Leave the group that the server made for itself, if this process is in it."""
    room = group / _SERVER / _PROCESSES
    if not room.exists() or str(os.getpid()) not in room.read_text().split():
        return
    for parent in (group, group.parent):
        _enable(parent, (parent / _ENABLED).read_text().split(), "-")
    _write(group.parent / _PROCESSES, str(os.getpid()))


def _retry(remove: Callable[[], None], deadline: float) -> None:
    """Remove a group whose processes may still be on their way out."""
    while True:
        try:
            remove()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                _LOG.warning("a control group cannot be removed: %s", error)
                return
        time.sleep(_RETRY_S)
