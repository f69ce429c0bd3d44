"""The seccomp filter: what it decides, on both architectures, and what a box that runs under it can and cannot do."""

from __future__ import annotations

import errno
import os
import re
import struct
import textwrap
from pathlib import Path

import pytest

from sandbox_image.kernel.seccomp import ABSENT, ARCHITECTURES, CHECKED, REFUSED, filter_of_this_machine, filter_program
from tests.sandbox_image.running import Api

pytestmark = pytest.mark.any_user

ALLOW, KILL = "allow", "kill"
HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}


def decide(program: bytes, audit: int, number: int, *arguments: int) -> str:
    """What the kernel would do with a call: the filter's own instructions, interpreted as linux/filter.h has them."""
    data = struct.pack("<iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    at = accumulator = 0
    while True:
        code, then, otherwise, value = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            known = {0x7FFF0000: ALLOW, 0x80000000: KILL}
            return known[value] if value in known else errno.errorcode[value & 0xFFFF]
        else:
            taken = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[code]
            at += then if taken else otherwise


@pytest.fixture(params=list(ARCHITECTURES))
def machine(request: pytest.FixtureRequest) -> str:
    """Each architecture that there is a table for."""
    return str(request.param)


def test_the_numbers_are_the_kernels(machine: str) -> None:
    header = Path("/usr/include") / HEADERS[machine]
    if not header.exists():
        pytest.skip(f"needs the kernel's headers: {header}")
    found = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
        if not name.startswith("arch_")
    }
    table = {**REFUSED, **ABSENT, **CHECKED}
    own = {name: ARCHITECTURES[machine].number(numbers) for name, numbers in table.items()}
    compared = {name: number for name, number in own.items() if name in found}
    assert compared == {name: found[name] for name in compared}
    assert {name for name in set(own) - set(found) if own[name] is not None} <= {"open_tree_attr", "statmount", "listmount"}


def test_refused_calls(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program = filter_program(architecture)
    for calls, expected in ((REFUSED, "EPERM"), (ABSENT, "ENOSYS")):
        for name, numbers in calls.items():
            number = architecture.number(numbers)
            if number is not None:
                assert decide(program, architecture.audit, number) == expected, name


@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("clone", [0x01200011], ALLOW),
        ("clone", [0x003D0F00], ALLOW),
        ("clone", [0x10000000 | 17], "EPERM"),
        ("clone", [0x00020000 | 17], "EPERM"),
        ("clone", [0x02000000], "EPERM"),
        ("unshare", [0x00000400], ALLOW),
        ("unshare", [0x00000080], "EPERM"),
        ("unshare", [0x40000000], "EPERM"),
        ("personality", [0xFFFFFFFF], ALLOW),
        ("personality", [0x00040000], ALLOW),
        ("personality", [0x00400000], "EPERM"),
        ("ioctl", [0, 0x5412], "EPERM"),
        ("ioctl", [0, 0xFFFFFFFF_00005412], "EPERM"),
        ("ioctl", [0, 0x541C], "EPERM"),
        ("ioctl", [0, 0x5413], ALLOW),
        ("socket", [1, 5, 0], ALLOW),
        ("socket", [2, 0x80801, 6], ALLOW),
        ("socket", [10, 2, 17], ALLOW),
        ("socket", [2, 2, 1], ALLOW),
        ("socket", [2, 1, 132], "EPROTONOSUPPORT"),
        ("socket", [2, 5, 0], "ESOCKTNOSUPPORT"),
        ("socket", [16, 3, 0], ALLOW),
        ("socket", [16, 3, 12], "EPROTONOSUPPORT"),
        ("socket", [40, 1, 0], "EAFNOSUPPORT"),
        ("socket", [17, 3, 0], "EAFNOSUPPORT"),
        ("socket", [38, 5, 0], "EAFNOSUPPORT"),
        ("socketpair", [1, 1, 0], ALLOW),
        ("socketpair", [30, 1, 0], "EAFNOSUPPORT"),
    ],
)
def test_checked_calls(machine: str, call: str, arguments: list[int], expected: str) -> None:
    architecture = ARCHITECTURES[machine]
    number = architecture.number(CHECKED[call])
    assert number is not None
    assert decide(filter_program(architecture), architecture.audit, number, *arguments) == expected


def test_foreign_and_future_calls(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program = filter_program(architecture)
    assert decide(program, 0x40000003, 1) == KILL
    assert decide(program, 0x40000028, 1) == KILL
    assert decide(program, architecture.audit, 0x40000000 | 1) == "ENOSYS"
    assert decide(program, architecture.audit, 470) == "ENOSYS"
    table = {**REFUSED, **ABSENT, **CHECKED}
    listed = {architecture.number(numbers) for numbers in table.values()}
    allowed = [number for number in range(470) if decide(program, architecture.audit, number) == ALLOW]
    assert set(allowed) >= set(range(470)) - listed


@pytest.mark.both_users
async def test_a_box_runs_under_it(api: Api) -> None:
    if filter_of_this_machine() is None:
        pytest.skip(f"there is no filter for {os.uname().machine}")
    _, health = await api.get("/health")
    assert health["limits"]["seccomp"] is True
    assert await api.output("grep -h '^Seccomp:' /proc/self/status /proc/1/status") == "Seccomp:\t2\n" * 2


async def test_what_software_needs_works(api: Api) -> None:
    source = """
        if __name__ == "__main__":
            import concurrent.futures, multiprocessing.shared_memory, os, pty, socket, subprocess, threading
            with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
                print(list(pool.map(abs, [-1, -2])))
            thread = threading.Thread(target=print, args=("thread",))
            thread.start()
            thread.join()
            near, far = socket.socketpair()
            near.send(b"pair")
            print(far.recv(9))
            server = socket.create_server(("127.0.0.1", 0))
            socket.create_connection(server.getsockname())
            print(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).family.name, socket.if_nameindex()[0][1])
            child, terminal = pty.fork()
            if child == 0:
                os.execvp("stty", ["stty", "size"])
            print(os.read(terminal, 99), os.waitpid(child, 0)[1], subprocess.run(["setarch", "-R", "true"]).returncode)
            memory = multiprocessing.shared_memory.SharedMemory(create=True, size=99)
            print(memory.size >= 99)
            memory.unlink()
    """
    await api.tool("write_file", {"path": "needs.py", "content": textwrap.dedent(source)})
    shown = await api.output("python3 -u needs.py 2>/dev/null")
    assert shown.split("\n") == ["[1, 2]", "thread", "b'pair'", "AF_INET6 lo", "b'0 0\\r\\n' 0 0", "True", ""]


async def test_tracing_works(api: Api) -> None:
    await api.tool(
        "write_file",
        {
            "path": "trace.py",
            "content": textwrap.dedent("""
                import ctypes, os, signal, sys
                libc = ctypes.CDLL(None)
                child = os.fork()
                if child == 0:
                    libc.ptrace(0, 0, 0, 0)
                    os.kill(os.getpid(), signal.SIGSTOP)
                    os._exit(7)
                os.waitpid(child, 0)
                print("continued", libc.ptrace(7, child, 0, 0))
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            """),
        },
    )
    assert await api.output("python3 trace.py") == "continued 0\n7\n"


async def test_the_kernel_refuses_in_a_box(api: Api) -> None:
    """Each call with arguments that the kernel itself would answer differently: with a handle, or with another error."""
    column = ARCHITECTURES.get(os.uname().machine)
    if column is None:
        pytest.skip(f"there is no filter for {os.uname().machine}")
    numbers = {name: column.number(REFUSED[name]) for name in ("keyctl", "add_key", "userfaultfd", "perf_event_open", "bpf")}
    numbers |= {"io_uring_setup": 425, "unshare": column.number(CHECKED["unshare"]), "clone3": 435}
    source = f"""
        import ctypes, errno, socket
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, number, *arguments):
            ctypes.set_errno(0)
            result = libc.syscall(number, *arguments)
            print(name, result, errno.errorcode.get(ctypes.get_errno()))
        numbers = {numbers!r}
        call("session keyring", numbers["keyctl"], 0, -3, 1)
        call("add_key", numbers["add_key"], b"user", b"name", b"x", 1, -3)
        call("io_uring", numbers["io_uring_setup"], 4, ctypes.create_string_buffer(120))
        call("userfaultfd", numbers["userfaultfd"], 1)
        call("perf", numbers["perf_event_open"], 0, 0, -1, -1, 0)
        call("bpf", numbers["bpf"], 0, 0, 0)
        call("namespaces", numbers["unshare"], 0x10000000)
        call("clone3", numbers["clone3"], 0, 0)
        for family in (40, 17, 38, 31):
            try:
                socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                print(family, errno.errorcode[error.errno])
    """
    await api.tool("write_file", {"path": "calls.py", "content": textwrap.dedent(source)})
    assert (await api.output("python3 calls.py")).splitlines() == [
        "session keyring -1 EPERM",
        "add_key -1 EPERM",
        "io_uring -1 ENOSYS",
        "userfaultfd -1 EPERM",
        "perf -1 EPERM",
        "bpf -1 EPERM",
        "namespaces -1 EPERM",
        "clone3 -1 ENOSYS",
        *[f"{family} EAFNOSUPPORT" for family in (40, 17, 38, 31)],
    ]
