"""What an attack on a slot is: what it tries, how one sees that it worked, and where it does work."""

from __future__ import annotations

import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Protocol

from tests.security.field import Field
from tests.support.waiting import PATIENCE_S

_END = "END-OF-ATTACK"
BREACH = "BREACH"
"""What a script prints when it got what it wanted and there is no secret to show for it."""

_PYTHON = """
import ctypes, errno, fcntl, mmap, os, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {
    "x86_64": {
        "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
        "io_uring_setup": 425, "open_by_handle_at": 304, "name_to_handle_at": 303, "fsopen": 430, "clone3": 435,
        "pidfd_open": 434, "pidfd_getfd": 438, "kexec_load": 246, "fanotify_init": 300, "process_vm_readv": 310,
        "setns": 308, "mount": 165, "unshare": 272, "syslog": 103, "clone": 56, "open_tree": 428, "mount_setattr": 442,
        "move_mount": 429, "pivot_root": 155, "chroot": 161, "swapon": 167, "reboot": 169, "init_module": 175,
        "quotactl": 179, "acct": 163, "personality": 135, "lookup_dcookie": 212, "kcmp": 312, "process_vm_writev": 311,
        "fsmount": 432, "memfd_secret": 447,
    },
    "aarch64": {
        "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
        "io_uring_setup": 425, "open_by_handle_at": 265, "name_to_handle_at": 264, "fsopen": 430, "clone3": 435,
        "pidfd_open": 434, "pidfd_getfd": 438, "kexec_load": 104, "fanotify_init": 262, "process_vm_readv": 270,
        "setns": 268, "mount": 40, "unshare": 97, "syslog": 116, "clone": 220, "open_tree": 428, "mount_setattr": 442,
        "move_mount": 429, "pivot_root": 41, "chroot": 51, "swapon": 224, "reboot": 142, "init_module": 105,
        "quotactl": 60, "acct": 89, "personality": 92, "lookup_dcookie": 18, "kcmp": 272, "process_vm_writev": 271,
        "fsmount": 432, "memfd_secret": 447,
    },
}[os.uname().machine]
def syscall(name, *arguments):
    "The result and the name of the error."
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(_NUMBERS[name]), *(ctypes.c_long(a) if type(a) is int else a for a in arguments))
    return result, errno.errorcode.get(ctypes.get_errno(), "") if result < 0 else ""
def judge(won, *why):
    print("BREACH" if won else "HELD", *why, flush=True)
def refused(result):
    "Whether a filter or a missing right answered, and not the call itself."
    return result[0] < 0 and result[1] in ("EPERM", "ENOSYS", "EACCES")
"""


def python(source: str, *before: str) -> str:
    """A command that runs Python, with helpers for system calls at hand; an error of the system means that it held."""
    body = textwrap.indent("\n".join(textwrap.dedent(part) for part in (*before, source)), "    ")
    caught = "except OSError as error:\n    judge(False, type(error), error)"
    return f"python3 -I - <<'{_END}'\n{_PYTHON}try:\n{body}\n{caught}\n{_END}"


@dataclass(frozen=True)
class Ask:
    """What the owner of a slot asks the server after the attacker has prepared the workspace: a tool or an artifact route."""

    what: str
    arguments: dict[str, Any] = dataclass_field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What an attack has led to: what was printed or answered, how long it took, and the field it happened on.

    `expired` says that somebody had to end it who waited for it.
    """

    text: str
    exit_code: int | None
    seconds: float
    field: Field = dataclass_field(repr=False)
    expired: bool = False


Predicate = Callable[[Outcome], bool]


def fell_over(attack: Attack, outcome: Outcome) -> bool:
    """Whether a script failed for a reason of its own, and not because it was refused what it wanted."""
    return _END in attack.script and "HELD" not in outcome.text and outcome.exit_code in (0, 1)


def breach(outcome: Outcome) -> bool:
    """The script says that it worked."""
    return BREACH in outcome.text


def leaks(outcome: Outcome) -> bool:
    """A secret of the host has come out."""
    return any(secret in outcome.text for secret in outcome.field.secrets)


def destroys(outcome: Outcome) -> bool:
    """A file of the host has changed."""
    return outcome.field.damaged()


def kills(outcome: Outcome) -> bool:
    """A process outside of the slot is dead or stopped."""
    return not outcome.field.canary_runs()


def hangs(outcome: Outcome) -> bool:
    """There was no answer."""
    return outcome.expired


def takes(seconds: float) -> Predicate:
    """The answer came late, or not at all."""
    return lambda outcome: outcome.expired or outcome.seconds >= seconds


class Site(Protocol):
    """Where an attack takes place."""

    needs_root: bool

    def strike(self, attack: Attack, field: Field) -> Awaitable[Outcome]:
        """Run it."""


@dataclass(frozen=True)
class Attack:
    """One attack, by name; `threat` is what the attacker gains. The same `script` and `ask` run in a slot and at the control,
    which lacks the defence."""

    name: str
    threat: str
    script: str
    control: Site
    succeeded: Predicate = breach
    ask: Ask | None = None
    timeout_s: float = PATIENCE_S
    """How long the script may run; the server ends it then, and the control as well unless that has less time."""
    control_s: float | None = None
    """How long the control may run, of an attack that works if it has not ended by then."""
    as_user: bool = True
    """Whether to run it against a server of an ordinary user as well, where something could be different."""
