"""Attacks on the files and secrets of the host."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.security.attack import Attack, destroys, leaks, python
from tests.security.field import Field, field_of
from tests.security.sites import RIGHTS_OF_ROOT, BoxWithout, Outside, WithoutIsolation
from tests.security.table import each, hold

ATTACKS = [
    Attack("a file by its path", "reads what the host keeps", "cat $SECRET_FILE", WithoutIsolation(), leaks),
    Attack(
        "a search by name",
        "finds secrets",
        # In the first directory on the way, however deep temporary files lie.
        'find "/$(echo $SECRET_FILE | cut -d/ -f2)" -name secret -exec cat {} + 2>/dev/null',
        WithoutIsolation(),
        leaks,
    ),
    Attack(
        "the root of PID 1",
        "leaves through /proc",
        "cat /proc/1/root$SECRET_FILE /proc/self/root$SECRET_FILE "
        "/proc/$PPID/root$SECRET_FILE /proc/$$/cwd/../../../../../../..$SECRET_FILE",
        WithoutIsolation(),
        leaks,
    ),
    Attack("a write by path", "changes the host", "echo spoiled > $VICTIM_FILE", WithoutIsolation(), destroys),
    Attack(
        "a removal by path",
        "empties the host",
        "rm -rf $VICTIM_FILE $SHOWN/../victim; : > $VICTIM_FILE; chmod 0 $VICTIM_FILE",
        WithoutIsolation(),
        destroys,
    ),
    Attack("a write to a shown tree", "changes what other slots run", "touch $SHOWN/planted", WithoutIsolation(), destroys),
    Attack(
        "a shown tree made writable",
        "changes what other slots run",
        "mount -o remount,rw,bind $SHOWN; mount -o remount,rw $SHOWN; touch $SHOWN/planted",
        RIGHTS_OF_ROOT,
        destroys,
    ),
    Attack(
        "/usr made writable",
        "changes what other slots run",
        "mount -o remount,rw,bind /usr && test -w /usr/bin && echo BREACH",
        RIGHTS_OF_ROOT,
    ),
    Attack(
        "the box's own root made writable",
        "hides files where no limit is",
        "mount -o remount,rw / ; mkdir /more && echo BREACH",
        RIGHTS_OF_ROOT,
    ),
    Attack(
        "the box's root directory",
        "hides files where no limit is",
        "touch /planted && echo BREACH",
        BoxWithout(("--remount-ro /",)),
    ),
    Attack(
        "/dev as a store",
        "uses memory that no limit counts",
        "touch /dev/planted && echo BREACH",
        BoxWithout(("--remount-ro /dev",)),
    ),
    Attack(
        "the password hashes", "learns passwords", "cat /etc/shadow | grep -q root: && echo BREACH", Outside(needs_root=True)
    ),
    Attack(
        "the password hashes as root without rights",
        "learns passwords",
        "cat /etc/shadow | grep -q root: && echo BREACH",
        BoxWithout(added=("--ro-bind", "/etc", "/etc"), with_root=True),
    ),
    Attack("the host's users", "learns who is there", "grep -q ^daemon: /etc/passwd && echo BREACH", WithoutIsolation()),
    Attack(
        "a file by its handle",
        "opens any file of a mounted disk by its inode",
        python("""
        import pathlib
        here = os.open(".", os.O_RDONLY)
        class Handle(ctypes.Structure):
            _fields_ = [("size", ctypes.c_uint), ("kind", ctypes.c_int), ("bytes", ctypes.c_ubyte * 128)]
        # The root directory of a disk has the same handle everywhere.
        for number, kind in ((2, 1), (128, 1), (256, 1)):
            handle = Handle(8, kind)
            struct.pack_into("II", handle.bytes, 0, number, 0)
            found, why = syscall("open_by_handle_at", here, ctypes.byref(handle), os.O_DIRECTORY)
            if found >= 0:
                break
        judge(found >= 0 and "lost+found" in os.listdir(found) or found >= 0 and "etc" in os.listdir(found), why)
        """),
        Outside(needs_root=True),
    ),
    Attack(
        "the disk itself",
        "reads every file",
        python("""
        opened = []
        for name in os.listdir("/dev"):
            if name.startswith(("vd", "sd", "nvme", "dm-", "loop", "mem", "port", "kmsg", "fuse", "kvm", "vhost", "zram")):
                try:
                    opened.append(os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK))
                except OSError:
                    pass
        judge(opened)
        """),
        Outside(needs_root=True),
    ),
    Attack(
        "a device file of one's own",
        "reads every file",
        "mknod disk b 7 0 && echo BREACH; rm -f disk; mknod zero c 1 3 && echo BREACH",
        Outside(needs_root=True),
    ),
    Attack(
        "the program that gets core dumps",
        "runs a program as the host's root",
        python("""
        try:
            os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
            judge(True)
        except OSError as error:
            judge(False, error)
        """),
        BoxWithout(
            ("--unshare-user", "--disable-userns", "--cap-drop", "--unshare-pid"),
            added=("--bind", "/proc", "/proc"),
            with_root=True,
        ),
    ),
    Attack(
        "kernel settings as root without rights",
        "changes the machine",
        python("""
        for name in ("kernel/hostname", "vm/drop_caches", "kernel/modprobe", "kernel/core_pattern", "fs/protected_hardlinks"):
            try:
                os.close(os.open(f"/proc/sys/{name}", os.O_WRONLY))
                judge(True, name)
            except OSError as error:
                judge(False, name, error)
        """),
        BoxWithout(("--unshare-pid", "--as-pid-1"), added=("--bind", "/proc", "/proc"), with_root=True),
    ),
    Attack(
        "/sys",
        "learns and changes the hardware's state",
        "ls /sys/kernel /sys/class /sys/fs && echo BREACH",
        WithoutIsolation(),
    ),
    Attack(
        "a socket of a service",
        "talks to the host's services by a path",
        python("""
        client = socket.socket(socket.AF_UNIX)
        client.connect(os.environ["UNIX_SOCKET"])
        print(client.recv(100).decode())
        """),
        WithoutIsolation(),
        leaks,
    ),
    Attack("a hard link", "keeps a file of the host for later", "ln $VICTIM_FILE kept && cat kept && echo BREACH", Outside()),
    Attack(
        "a mount of the host's root", "sees everything", "mkdir m; mount --bind / m && echo BREACH; umount m", RIGHTS_OF_ROOT
    ),
    Attack(
        "another root",
        "leaves by chroot and open directories",
        python("""
        os.mkdir("cell")
        out = os.open("/", os.O_RDONLY)
        result = syscall("chroot", b"cell")
        judge(result[0] == 0, result)
        """),
        RIGHTS_OF_ROOT,
    ),
    Attack(
        "the namespaces of other processes",
        "enters the host's view",
        python("""
        for process in ("1", os.environ["CANARY"], os.environ["SERVER_PID"]):
            for name in ("mnt", "pid", "net", "ipc", "uts"):
                try:
                    space = os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY)
                    judge(syscall("setns", space, 0)[0] == 0, name)
                except OSError as error:
                    judge(False, name, error)
        """),
        Outside(needs_root=True),
    ),
]


@each(ATTACKS)
async def test_attack(field: Field, attack: Attack) -> None:
    await hold(field, attack)


async def test_a_program_with_roots_rights(field: Field) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a program with root's rights needs root")
    program = field.grounds / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    with field_of(shown=program, other_user=field.other_user) as own:
        script = f"test $({program} -u) = 0 && echo BREACH; {program} -u"
        outcome = await hold(own, Attack("a set-uid program", "becomes root", script, WithoutIsolation()))
        assert outcome.text.strip().isdigit()
