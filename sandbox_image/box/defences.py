"""The defences of a box: found by looking at a running one, each with the remedy where it is missing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_image.box.blueprint import Blueprint, SlotDirectory
from sandbox_image.errors import MissingDefenceError

BUBBLEWRAP_REMEDY = (
    "bubblewrap needs user namespaces: sysctl kernel.unprivileged_userns_clone=1 and "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker run the container with --security-opt seccomp=unconfined "
    "--security-opt systempaths=unconfined; or give up isolation with --isolation none"
)
_GROUPS_REMEDY = (
    "run the server as root where /sys/fs/cgroup can be written, or by systemd-run --user --scope -p Delegate=yes; "
    "elsewhere limit the container or the machine"
)
_SECCOMP_REMEDY = "run on x86_64 or aarch64, with a kernel that has CONFIG_SECCOMP_FILTER"
DISK = "disk_limit"
"""The only defence that is not the box's: the storage of the workspaces reports it."""
REMEDIES = {
    "namespaces": BUBBLEWRAP_REMEDY,
    "no_capabilities": BUBBLEWRAP_REMEDY,
    "no_new_privileges": BUBBLEWRAP_REMEDY,
    "unprivileged_user": BUBBLEWRAP_REMEDY,
    "no_network": BUBBLEWRAP_REMEDY,
    "read_only_system": "take away the right to write from /usr and /etc for others",
    "seccomp": _SECCOMP_REMEDY,
    "keyrings": _SECCOMP_REMEDY,
    "process_limits": "raise the hard limits of the server, see ulimit -H -a",
    "user_per_slot": "run the server as root",
    "memory_limit": _GROUPS_REMEDY,
    "process_count_limit": _GROUPS_REMEDY,
    "processor_shares": _GROUPS_REMEDY,
    DISK: "let workspaces be in memory, without --workspaces-on-disk; an ordinary user needs user namespaces for it",
}
"""Every defence, with what to do where it is missing."""
BASICS = (
    "namespaces",
    "no_capabilities",
    "no_new_privileges",
    "unprivileged_user",
    "no_network",
    "read_only_system",
    "seccomp",
    "keyrings",
    "process_limits",
)
"""Without these there is no isolation: always required, unless the server runs with `--isolation none`."""

_NAMESPACES = ("user", "pid", "net", "ipc", "uts", "mnt")
_CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_CONTROLLERS = {"memory_limit": "memory", "process_count_limit": "pids", "processor_shares": "cpu"}
_LIMIT_TITLES = {
    "NOFILE": "Max open files",
    "NPROC": "Max processes",
    "CORE": "Max core file size",
    "FSIZE": "Max file size",
    "MEMLOCK": "Max locked memory",
    "DATA": "Max data size",
}


@dataclass(frozen=True)
class Defence:
    """Whether a defence holds, and what was found, or what takes the place of a missing one."""

    holds: bool
    detail: str


def check_required(found: Mapping[str, Defence], required: Sequence[str]) -> None:
    """Check that those of the `required` defences that were looked at hold.

    Raises:
        MissingDefenceError: one does not; the text names the first and its remedy.
    """
    for name in required:
        if name in found and not found[name].holds:
            raise MissingDefenceError(f"the defence {name} is missing: {found[name].detail}; remedy: {REMEDIES[name]}")


def inspect(
    blueprint: Blueprint, directory: SlotDirectory, facts: Mapping[str, str], limits: Mapping[str, int]
) -> dict[str, Defence]:
    """The defences of a box by name, without `DISK`, from what its init reports (`sandbox_image.init.facts`) and its limits."""
    found = {**_of_slot(blueprint, directory), "process_limits": _process_limits(blueprint.process_limits, limits)}
    if blueprint.isolation == "none":
        given_up = Defence(False, "isolation was given up with --isolation none")
        return {name: found.get(name, given_up) for name in REMEDIES if name != DISK}
    found |= {
        "namespaces": _namespaces(facts),
        "no_capabilities": _same(facts, _CAPABILITY_SETS, "0" * 16),
        "no_new_privileges": _same(facts, ("NoNewPrivs",), "1"),
        "unprivileged_user": _user(directory, facts),
        "no_network": _network(facts),
        "read_only_system": _read_only(facts),
        "seccomp": _same(facts, ("Seccomp",), "2"),
        "keyrings": _keyrings(facts),
    }
    return {name: found[name] for name in REMEDIES if name != DISK}


def read_limits(pid: int) -> dict[str, int]:
    """The hard resource limits of a process, by the names of `RLIMIT_*`; -1 is unlimited.

    Raises:
        OSError: it is gone.
    """
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    found = {line[:26].strip(): line[26:].split()[1] for line in lines}
    return {name: -1 if found[title] == "unlimited" else int(found[title]) for name, title in _LIMIT_TITLES.items()}


def _of_slot(blueprint: Blueprint, directory: SlotDirectory) -> dict[str, Defence]:
    groups, instead = blueprint.groups, blueprint.process_limits
    replaced = {
        "memory_limit": f"each process has RLIMIT_DATA={instead.get('DATA')} instead",
        "process_count_limit": f"RLIMIT_NPROC={instead['NPROC']} counts the processes of a user instead",
        "processor_shares": "slots with more processes get more of the processor",
    }
    enforced = {
        "memory_limit": f"{groups.limits.memory_bytes} bytes for all of a slot",
        "process_count_limit": f"{groups.limits.processes} processes for all of a slot",
        "processor_shares": "the same for every slot",
    }
    found = {
        name: Defence(True, f"{enforced[name]}, cgroup version {groups.versions[controller]}")
        if controller in groups.versions
        else Defence(False, f"{groups.missing[controller]}; {replaced[name]}")
        for name, controller in _CONTROLLERS.items()
    }
    shared = "all slots run as the server's user, in user namespaces of their own"
    own = directory.uid is not None
    return {"user_per_slot": Defence(own, f"user {directory.uid} and following" if own else shared), **found}


def _same(facts: Mapping[str, str], names: Sequence[str], value: str) -> Defence:
    shown = ", ".join(f"{name} {facts[name]}" for name in names)
    return Defence(all(facts[name] == value for name in names), shown)


def _namespaces(facts: Mapping[str, str]) -> Defence:
    shared = [name for name in _NAMESPACES if facts[f"Namespace-{name}"] == os.readlink(f"/proc/self/ns/{name}")]
    if facts["Pid"] != "1":
        shared.append("pid")
    return Defence(not shared, f"shared with the server: {', '.join(shared)}" if shared else f"own {', '.join(_NAMESPACES)}")


def _user(directory: SlotDirectory, facts: Mapping[str, str]) -> Defence:
    uids = set(facts["Uid"].split())
    expected = os.geteuid() if directory.uid is None else directory.uid
    return Defence(uids == {str(expected)} and expected != 0, f"user {', '.join(sorted(uids))}")


def _network(facts: Mapping[str, str]) -> Defence:
    interfaces = facts["Box-Interfaces"].split()
    return Defence(interfaces == ["lo+"], f"interfaces: {', '.join(name.rstrip('+-') for name in interfaces)}")


def _read_only(facts: Mapping[str, str]) -> Defence:
    writable = facts["Box-Writable"].split()
    return Defence(not writable, f"it can write {', '.join(writable)}" if writable else "/, /usr, /etc and /dev")


def _keyrings(facts: Mapping[str, str]) -> Defence:
    closed = facts["Seccomp"] == "2"
    return Defence(
        closed, "the seccomp filter refuses their calls" if closed else "slots may share the server's session keyring"
    )


def _process_limits(wanted: Mapping[str, int], found: Mapping[str, int]) -> Defence:
    unset = [name for name, value in wanted.items() if not 0 <= found[name] <= value]
    shown = ", ".join(f"{name} {found[name]}" for name in wanted)
    return Defence(not unset, f"not as wanted: {', '.join(unset)}" if unset else shown)
