"""Attacks by system calls: for rights, namespaces, and parts of the kernel that no task needs."""

from __future__ import annotations

import pytest

from tests.sandbox_image.running import Api
from tests.security.attack import Attack, python
from tests.security.field import Field
from tests.security.sites import RIGHTS_OF_ROOT, BoxWithout, Outside
from tests.security.table import each, hold

UNFILTERED = BoxWithout(("--seccomp",))
FREE = BoxWithout(("--seccomp", "--disable-userns"))
ROOT = Outside(needs_root=True)


def call(name: str, *arguments: str) -> str:
    """Ask the kernel for something; it has worked if a filter or a missing right is not what answers."""
    return python(
        f"result = syscall({name!r}{''.join(f', {argument}' for argument in arguments)})\njudge(not refused(result), result)"
    )


def new_socket(family: int, kind: int, protocol: int = 0) -> str:
    return python(
        f"""
        try:
            socket.socket({family}, {kind}, {protocol})
            judge(True)
        except OSError as error:
            judge(False, error)
        """
    )


ATTACKS = [
    Attack(
        "capabilities",
        "does what root does",
        "grep -q '^CapEff:.*[1-9a-f]' /proc/self/status && echo BREACH",
        BoxWithout(("--unshare-user", "--disable-userns", "--cap-drop"), with_root=True),
    ),
    Attack(
        "capabilities to come",
        "does what root does",
        "grep -qE '^Cap(Bnd|Inh|Prm|Amb):.*[1-9a-f]' /proc/self/status && echo BREACH",
        Outside(),
    ),
    Attack(
        "new privileges",
        "gains rights by set-uid programs",
        "grep -q '^NoNewPrivs:.0' /proc/self/status && echo BREACH",
        Outside(),
    ),
    Attack(
        "no filter",
        "uses all of the kernel",
        "grep -q '^Seccomp:.0' /proc/self/status && echo BREACH",
        UNFILTERED,
        as_user=False,
    ),
    Attack("a user namespace", "is root in a world of its own", "unshare --user --map-root-user sh -c 'echo BREACH'", FREE),
    Attack(
        "a user namespace, filter or not",
        "is root in a world of its own",
        "unshare --user sh -c 'echo BREACH'",
        BoxWithout(("--disable-userns", "--seccomp")),
    ),
    Attack(
        "a user namespace by clone", "is root in a world of its own", call("clone", "0x10000000 | 17", "0", "0", "0", "0"), FREE
    ),
    Attack(
        "a user namespace by clone3",
        "is root in a world of its own",
        python("""
        arguments = struct.pack("11Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)
        result = syscall("clone3", arguments, len(arguments))
        if result[0] == 0:
            os._exit(0)
        judge(not refused(result), result)
        """),
        FREE,
    ),
    Attack(
        "a network namespace", "builds rules and interfaces", "unshare --user --map-root-user --net true && echo BREACH", FREE
    ),
    Attack(
        "a mount namespace",
        "mounts what it likes",
        "unshare --user --map-root-user --mount mount -t tmpfs none /tmp && echo BREACH",
        FREE,
    ),
    Attack(
        "an overlay of its own",
        "reaches a part of the kernel with a history",
        "mkdir -p a b c d; unshare --user --map-root-user --mount mount -t overlay -o lowerdir=a:b none d && echo BREACH",
        FREE,
    ),
    Attack("a time namespace", "is root in a world of its own", call("unshare", "0x10000080"), FREE),
    Attack("the new mount calls", "mounts what it likes", call("fsopen", "b'tmpfs'", "0"), RIGHTS_OF_ROOT),
    Attack(
        "a copy of the tree of mounts",
        "takes mounts apart",
        call("open_tree", "-100", "b'/usr'", "0"),
        UNFILTERED,
        as_user=False,
    ),
    Attack(
        "a change of a mount",
        "makes it writable",
        python("""
        attributes = struct.pack("4Q", 0, 1, 0, 0)
        result = syscall("mount_setattr", -100, b"/usr", 0, attributes, len(attributes))
        judge(result[0] == 0, result)
        """),
        RIGHTS_OF_ROOT,
    ),
    Attack("a change of root", "leaves the box", call("pivot_root", "b'/tmp'", "b'/tmp'"), RIGHTS_OF_ROOT),
    Attack(
        "keys",
        "reads and leaves what other slots can see",
        call("add_key", "b'user'", "b'attack'", "b'x'", "1", "-2"),
        UNFILTERED,
    ),
    Attack(
        "requests of keys",
        "starts a program of the host",
        call("request_key", "b'user'", "b'attack'", "0", "-2"),
        UNFILTERED,
        as_user=False,
    ),
    Attack("the session's keys", "reads the server's keys", call("keyctl", "0", "-3", "0"), UNFILTERED, as_user=False),
    Attack("io_uring", "does what filters do not see", call("io_uring_setup", "1", "0"), UNFILTERED),
    Attack("programs in the kernel", "runs code in the kernel", call("bpf", "0", "0", "0"), UNFILTERED),
    Attack(
        "performance counters",
        "watches other processes",
        call("perf_event_open", "0", "0", "-1", "-1", "0"),
        UNFILTERED,
        as_user=False,
    ),
    Attack("faults in user space", "stops the kernel in the middle", call("userfaultfd", "1"), UNFILTERED, as_user=False),
    Attack("watching files", "sees what others do to a disk", call("fanotify_init", "0x200", "0"), UNFILTERED, as_user=False),
    Attack(
        "a handle of a file",
        "opens files by their inodes",
        call("name_to_handle_at", "-100", "b'/usr'", "0", "0", "0"),
        UNFILTERED,
        as_user=False,
    ),
    Attack(
        "opening by a handle",
        "opens files by their inodes",
        call("open_by_handle_at", "-1", "0", "0"),
        UNFILTERED,
        as_user=False,
    ),
    Attack("the kernel's log", "learns addresses of the kernel", call("syslog", "10", "0", "0"), ROOT),
    Attack("swap", "writes memory to a disk", call("swapon", "b'/nothing'", "0"), ROOT),
    Attack("a kernel module", "runs code in the kernel", "grep -q '^CapEff:.*f' /proc/self/status && echo BREACH", ROOT),
    Attack("process accounting", "writes to the host's files", call("acct", "b'/nothing/at/all'"), ROOT),
    Attack("a quota", "limits others", call("quotactl", "0", "0", "0", "0"), UNFILTERED, as_user=False),
    Attack("the host's name", "is taken for another machine", "hostname $(hostname) && echo BREACH", ROOT),
    Attack(
        "a program of another ABI",
        "gets around the filter",
        python("""
        # getpid of 32-bit programs, by the gate that they use; a filter that knows one table lets it pass.
        code = bytes.fromhex("b814000000cd80c3") if os.uname().machine == "x86_64" else bytes.fromhex("c0035fd6")
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(code)
        print("HELD unless it goes on", flush=True)
        gate = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        judge(gate() == os.getpid())
        """),
        UNFILTERED,
    ),
    Attack("a socket to the hypervisor", "leaves the machine past the network", new_socket(40, 1), UNFILTERED),
    Attack("packets of all sorts", "sees and forges the traffic of others", new_socket(17, 3, 768), ROOT),
    Attack("raw packets", "forges addresses", new_socket(2, 3, 1), ROOT),
    Attack("the firewall's socket", "changes the rules", new_socket(16, 3, 12), UNFILTERED, as_user=False),
    Attack("the kernel's messages about devices", "watches the hardware", new_socket(16, 3, 15), UNFILTERED, as_user=False),
    Attack(
        "typing into a terminal",
        "types in whoever's terminal it has",
        python("""
        import termios
        master, slave = os.openpty()
        try:
            fcntl.ioctl(slave, termios.TIOCSTI, b"x")
            judge(True)
        except OSError as error:
            judge(error.errno not in (errno.EPERM,), error)
        """),
        ROOT,
    ),
    Attack(
        "a line discipline",
        "loads a module",
        python("""
        import termios
        master, slave = os.openpty()
        try:
            fcntl.ioctl(slave, termios.TIOCSETD, struct.pack("i", 0))
            judge(True)
        except OSError as error:
            judge(False, error)
        """),
        UNFILTERED,
        as_user=False,
    ),
    Attack(
        "real-time priority",
        "starves everybody else",
        python("""
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            judge(True)
        except OSError as error:
            judge(False, error)
        """),
        ROOT,
    ),
    Attack("a higher priority", "starves everybody else", "nice -n -10 sh -c 'test $(nice) -lt 0 && echo BREACH'", ROOT),
    Attack(
        "memory that stays",
        "takes memory that cannot be swapped",
        python("""
        memory = mmap.mmap(-1, 1 << 20)
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        judge(libc.mlock(address, ctypes.c_size_t(1 << 20)) == 0, errno.errorcode.get(ctypes.get_errno()))
        """),
        ROOT,
    ),
    Attack("an immutable file", "cannot be removed any more", "touch f && chattr +i f && echo BREACH; chattr -i f", ROOT),
    Attack(
        "another user",
        "acts in the name of another slot",
        python("""
        for user in (0, 60001, 1000):
            try:
                os.setuid(user)
                judge(user != 60000, user)
                break
            except OSError as error:
                judge(False, error)
        """),
        ROOT,
    ),
    Attack(
        "a group of the host",
        "reads what a group may read",
        python("""
        try:
            os.setgroups([0, 42])
            judge(True)
        except OSError as error:
            judge(False, error)
        """),
        ROOT,
    ),
]


@each(ATTACKS)
async def test_attack(field: Field, attack: Attack) -> None:
    await hold(field, attack)


async def test_honest_programs_work(field: Field) -> None:
    """The filter stands in nobody's way."""
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        shown = await api.output(
            python(
                """
                import concurrent.futures, multiprocessing, subprocess, tempfile
                with concurrent.futures.ThreadPoolExecutor() as threads:
                    assert list(threads.map(abs, [-1])) == [1]
                with multiprocessing.get_context("fork").Pool(2) as pool:
                    assert pool.map(abs, [-1, -2]) == [1, 2]
                assert subprocess.run(["sh", "-c", "exit 3"]).returncode == 3
                one, other = socket.socketpair()
                assert socket.create_server(("localhost", 0)) and socket.create_server(("::1", 0), family=socket.AF_INET6)
                assert os.memfd_create("x") and os.eventfd(0) and os.pidfd_open(os.getpid())
                print("fine")
                """
            )
        )
        assert shown == "fine\n"
    if not field.filter.read_bytes():
        pytest.skip("there is no filter for this architecture")
