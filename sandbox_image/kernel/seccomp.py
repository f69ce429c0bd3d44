"""The seccomp filter of a box: which system calls its programs may make. Assembled here, without a library.

The filter is a list of `struct sock_filter` (linux/filter.h) over `struct seccomp_data` (linux/seccomp.h). It refuses nothing
that is needed to edit, build and test software: threads, processes, tracing and sockets work. Calls that programs probe for
fail with ENOSYS, so that the programs do without; the others fail with EPERM.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from dataclasses import dataclass

_Numbers = tuple[int | None, int | None]
"""A system call's number on x86_64 and on aarch64."""

REFUSED: dict[str, _Numbers] = {
    # Namespaces and the tree of mounts: what the box is made of.
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    # Keyrings belong to users and sessions, not to namespaces: one box could read what another left.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Parts of the kernel with a history of faults, some of them open to everybody.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    # A handle opens a file past every directory above it.
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # The machine itself. Capabilities guard these as well.
    "syslog": (103, 116),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
}
ABSENT: dict[str, _Numbers] = {
    # Its flags are in memory, where a filter cannot look; C libraries fall back to clone.
    "clone3": (435, 435),
    # Does what other calls do, unseen by the filter.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "statmount": (457, 457),
    "listmount": (458, 458),
}
CHECKED: dict[str, _Numbers] = {
    "clone": (56, 220),
    "unshare": (272, 97),
    "personality": (135, 92),
    "ioctl": (16, 29),
    "socket": (41, 198),
    "socketpair": (53, 199),
}
"""Calls that are refused for some of their arguments only."""
LAST_KNOWN_CALL = 469
"""`file_setattr` of Linux 6.17, on both architectures. Later calls are refused (ENOSYS) until they have been reviewed."""

_NEW_NAMESPACES = 0x7E020000
_NEW_TIME_NAMESPACE = 0x80
_QUERY_PERSONALITY = 0xFFFFFFFF
# PER_LINUX32, UNAME26 and ADDR_NO_RANDOMIZE, which debuggers and sanitizers use.
_PERSONALITIES = 0x00060008
# TIOCSTI types into a terminal, TIOCLINUX pastes into one, TIOCSETD loads a line discipline.
_TERMINAL_TRICKS = (0x5412, 0x541C, 0x5423)
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_SOCKET_TYPE, _RAW = 0xF, 3
# IP's default, ICMP, TCP, UDP, ICMPv6 and MPTCP; the others are modules that a call would load.
_INTERNET_PROTOCOLS = (0, 1, 6, 17, 58, 262)
# ROUTE and SOCK_DIAG.
_NETLINK_PROTOCOLS = (0, 4)

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _GREATER, _SOME_BITS = 0x15, 0x25, 0x45
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_VERDICTS = {
    "allow": _ALLOW,
    "kill": _KILL_PROCESS,
    "refuse": _ERROR | errno.EPERM,
    "absent": _ERROR | errno.ENOSYS,
    "no such family": _ERROR | errno.EAFNOSUPPORT,
    "no such protocol": _ERROR | errno.EPROTONOSUPPORT,
    "no such type": _ERROR | errno.ESOCKTNOSUPPORT,
}


@dataclass(frozen=True)
class Architecture:
    """How the kernel tells of a machine's calls: its AUDIT_ARCH value, and which of the two `_Numbers` are its own."""

    audit: int
    column: int

    def number(self, numbers: _Numbers) -> int | None:
        """A call's number here; None where there is no such call."""
        return numbers[self.column]


ARCHITECTURES = {"x86_64": Architecture(0xC000003E, 0), "aarch64": Architecture(0xC00000B7, 1)}


class _Assembler:
    """Instructions with labels for jumps; an empty label is the next instruction."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, str, str]] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """Name the place of the next instruction."""
        self._labels[name] = len(self._instructions)

    def add(self, code: int, value: int, then: str = "", otherwise: str = "") -> None:
        """Append an instruction."""
        self._instructions.append((code, value, then, otherwise))

    def load_argument(self, index: int) -> None:
        """Load the lower half of an argument, which is all that the kernel looks at in those checked here."""
        self.add(_LOAD, 16 + 8 * index)

    def choose(self, accepted: tuple[int, ...], verdict: str, otherwise: str) -> None:
        """Jump by whether what was loaded is one of some values."""
        for value in accepted[:-1]:
            self.add(_EQUAL, value, verdict)
        self.add(_EQUAL, accepted[-1], verdict, otherwise)

    def assemble(self) -> bytes:
        """The program. Both architectures are little-endian."""
        return b"".join(
            struct.pack("<HBBI", code, self._distance(at, then), self._distance(at, otherwise), value)
            for at, (code, value, then, otherwise) in enumerate(self._instructions)
        )

    def _distance(self, at: int, label: str) -> int:
        return self._labels[label] - at - 1 if label else 0


def filter_program(architecture: Architecture) -> bytes:
    """The filter for an architecture, in the form that bubblewrap's `--seccomp` takes."""
    program = _Assembler()
    program.add(_LOAD, _ARCHITECTURE_AT)
    # The 32-bit calls of the same machine have other numbers, and one for all of sockets.
    program.add(_EQUAL, architecture.audit, "", "kill")
    program.add(_LOAD, _NUMBER_AT)
    # Covers the x32 calls too, whose numbers have bit 30 set.
    program.add(_GREATER, LAST_KNOWN_CALL, "absent")
    for calls, verdict in ((REFUSED, "refuse"), (ABSENT, "absent"), (CHECKED, None)):
        for name, numbers in calls.items():
            number = architecture.number(numbers)
            if number is not None:
                program.add(_EQUAL, number, verdict or name)
    program.add(_RETURN, _ALLOW)
    _check_arguments(program)
    for name, value in _VERDICTS.items():
        program.label(name)
        program.add(_RETURN, value)
    return program.assemble()


def _check_arguments(program: _Assembler) -> None:
    for call, flags in (("clone", _NEW_NAMESPACES), ("unshare", _NEW_NAMESPACES | _NEW_TIME_NAMESPACE)):
        program.label(call)
        program.load_argument(0)
        program.add(_SOME_BITS, flags, "refuse", "allow")
    program.label("personality")
    program.load_argument(0)
    program.add(_EQUAL, _QUERY_PERSONALITY, "allow")
    program.add(_SOME_BITS, _PERSONALITIES ^ 0xFFFFFFFF, "refuse", "allow")
    program.label("ioctl")
    program.load_argument(1)
    program.choose(_TERMINAL_TRICKS, "refuse", "allow")
    program.label("socket")
    program.label("socketpair")
    program.load_argument(0)
    program.add(_EQUAL, _UNIX, "allow")
    program.add(_EQUAL, _NETLINK, "netlink")
    program.choose((_INET, _INET6), "internet", "no such family")
    program.label("netlink")
    program.load_argument(2)
    program.choose(_NETLINK_PROTOCOLS, "allow", "no such protocol")
    program.label("internet")
    program.load_argument(1)
    program.add(_AND, _SOCKET_TYPE)
    program.add(_GREATER, _RAW, "no such type")
    program.load_argument(2)
    program.choose(_INTERNET_PROTOCOLS, "allow", "no such protocol")


def filter_of_this_machine() -> bytes | None:
    """The filter for programs of this machine; None if its architecture has no table here."""
    architecture = ARCHITECTURES.get(os.uname().machine)
    # A 32-bit Python on a 64-bit kernel could not even start under the 64-bit filter.
    return None if architecture is None or sys.maxsize < 2**32 else filter_program(architecture)
