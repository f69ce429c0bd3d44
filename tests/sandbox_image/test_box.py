"""What a box keeps in: the attacks run inside of it."""

from __future__ import annotations

import os
import socket
import textwrap

from tests.sandbox_image.running import Api, RunningServer, open_directory, running


async def python(api: Api, source: str) -> str:
    """Run Python in the box; what it prints."""
    await api.tool("write_file", {"path": "attack.py", "content": textwrap.dedent(source)})
    return await api.output("python3 attack.py")


async def test_a_slot_is_nobody(api: Api, server: RunningServer) -> None:
    status = await api.output("cat /proc/self/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert [fields[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")] == ["0" * 16] * 4
    assert fields["NoNewPrivs"] == "1"
    uid = int(await api.output("id -u"))
    server_uid = os.stat(f"/proc/{server.process.pid}").st_uid
    assert uid != 0
    assert uid == (60000 if server_uid == 0 else server_uid)
    assert await api.output("id -un; id -gn; groups | wc -w; hostname") == "user\nuser\n1\nsandbox\n"
    assert os.stat(server.workspace()).st_uid == uid


async def test_slots_have_different_users_when_the_server_is_root(api: Api, server: RunningServer) -> None:
    users = {await Api(api.session, slot).output("id -u") for slot in ("slot_0", "slot_1")}
    assert len(users) == (2 if os.stat(f"/proc/{server.process.pid}").st_uid == 0 else 1)


ATTACKS = [
    "cat /etc/shadow",
    "ls /root/.ssh || ls /home/user/../../root/.bashrc",
    "touch /usr/bin/new",
    "touch /new",
    "touch /etc/new",
    "touch /dev/new",
    "echo x > /init.py",
    "echo x > /proc/sys/kernel/core_pattern",
    "mount -t tmpfs tmpfs /tmp",
    "mount -o remount,rw /usr",
    "unshare --user true",
    "unshare --net true",
    "chroot / true",
    "mknod /tmp/disk b 8 0",
    "su -c true",
    "cat /proc/1/environ",
    "ls /proc/1/fd",
    "cat /proc/1/mem",
    "ls /sys/class",
    "nice -n -5 true 2>&1 | grep -q denied && exit 1",
]


async def test_refused(api: Api) -> None:
    for command in ATTACKS:
        assert not (await api.bash(command))["success"], command


async def test_places_that_can_be_written(api: Api) -> None:
    await api.output("for d in . /tmp /dev/shm /run $HOME; do echo x > $d/file; done; mkdir -p $HOME/.cache")
    assert await api.output("stat -fc %T /tmp $HOME /dev/shm /run") == "tmpfs\n" * 4
    await api.reset()
    assert await api.output("ls -A . /tmp /dev/shm /run $HOME | grep -c file || true") == "0\n"


async def test_temporary_places_are_bounded(api: Api) -> None:
    assert "No space left" in (await api.bash("head -c 20M /dev/zero > /run/big"))["output"]


async def test_no_network_but_its_own(api: Api) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    with listening:
        port = listening.getsockname()[1]
        shown = await python(
            api,
            f"""
            import socket
            print([name for _, name in socket.if_nameindex()])
            for address in (("127.0.0.1", {port}), ("192.0.2.1", 80), ("8.8.8.8", 53)):
                try:
                    socket.create_connection(address, 2)
                    print("connected to", address)
                except OSError as error:
                    print(type(error).__name__)
            server = socket.create_server(("localhost", 0))
            client = socket.create_connection(server.getsockname())
            print("own", socket.gethostbyname(socket.gethostname()))
            """,
        )
    assert shown == "['lo']\nConnectionRefusedError\nOSError\nOSError\nown 127.0.0.1\n"


async def test_the_init_cannot_be_traced_or_robbed(api: Api) -> None:
    shown = await python(
        api,
        """
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.ptrace(16, 1, 0, 0), errno.errorcode[ctypes.get_errno()])
        pidfd = libc.syscall(434, 1, 0)
        print(libc.syscall(438, pidfd, 3, 0), errno.errorcode[ctypes.get_errno()])
        """,
    )
    assert shown == "-1 EPERM\n-1 EPERM\n"
    assert await api.output("echo fine") == "fine\n"


async def test_nothing_of_the_host_shows(api: Api, server: RunningServer) -> None:
    assert (await api.bash("cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | grep -a 's[3]cret-of-the-host'"))["output"].count(
        "s3"
    ) == 0
    other = Api(api.session, "slot_1")
    await other.output("echo hidden > mine")
    assert (await api.bash("find / \\( -path /proc -o -path /usr \\) -prune -o -name mine -print 2>/dev/null"))["output"] == ""
    assert (await api.bash(f"ls {server.data} {server.socket}"))["metadata"]["exit_code"] != 0
    assert int(await api.output("ls -d /proc/[0-9]* 2> /dev/null | wc -l")) < 6


async def test_limits_of_processes(api: Api) -> None:
    limits = await api.output("ulimit -n; ulimit -c; ulimit -f; ulimit -Hn")
    assert limits.split() == ["4096", "0", str(4 * 1024**3 // 512), "4096"]
    assert not (await api.bash("ulimit -n 5000"))["success"]


async def test_processes_are_limited(api: Api) -> None:
    shown = await python(
        api,
        """
        import os, time
        count = 0
        try:
            while count < 2000:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                count += 1
        except BlockingIOError:
            pass
        print(900 < count < 1024)
        """,
    )
    assert shown == "True\n"


async def test_python_is_the_servers(api: Api) -> None:
    version = ".".join(map(str, __import__("sys").version_info[:3]))
    assert await api.output("python3 -c 'import sys, ssl, ctypes; print(sys.version.split()[0])'") == f"{version}\n"


async def test_health_says_what_holds(api: Api) -> None:
    status, health = await api.get("/health")
    assert (status, health["status"], health["isolation"], health["slots"]) == (200, "ok", "bubblewrap", 2)
    assert health["limits"]["rlimit_nproc"] == 1024
    assert health["limits"]["nested_user_namespaces"] is False


async def test_shown_trees_can_be_read_but_not_written() -> None:
    with open_directory() as directory:
        closed = directory / "closed"
        tree = closed / "tree"
        tree.mkdir(parents=True)
        (tree / "file").write_text("shown")
        (closed / "other").write_text("not shown")
        if os.geteuid() == 0:
            closed.chmod(0o700)
        with running("--read-only", str(tree), slots=1) as server:
            api = Api.over(server)
            async with api.session:
                assert await api.output(f"cat {tree}/file") == "shown"
                assert not (await api.bash(f"cat {closed}/other"))["success"]
                assert "Read-only" in (await api.bash(f"touch {tree}/new"))["output"]
        assert os.listdir(tree) == ["file"]
