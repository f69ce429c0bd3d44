"""The messages of the init, to the compiled one and to the Python one, each as PID 1 of a namespace."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_image import compile_init, init
from sandbox_image.kernel import linux

LIMITS = "4:0,7:4096"


class Talk:
    """An init that runs, and the server's ends of its descriptors."""

    def __init__(self, directory: Path, compiled: bool) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(20)
        self.output, their_output = os.pipe()
        box = [
            "bwrap",
            "--unshare-pid",
            "--unshare-net",
            "--as-pid-1",
            "--die-with-parent",
            "--dev-bind",
            "/",
            "/",
            "--proc",
            "/proc",
        ]
        given = [str(theirs.fileno()), str(their_output), LIMITS]
        if compiled:
            program = ["--setenv", "LD_PRELOAD", str(compile_init.LIBRARY), "--", "/bin/sh", "-c", " ".join(given)]
        else:
            program = ["--", sys.executable, "-I", "-S", init.__file__, *given]
        self.process = subprocess.Popen([*box, *program], pass_fds=(theirs.fileno(), their_output), cwd=directory)
        theirs.close()
        os.close(their_output)
        self.facts = self.hear()[1].decode()

    def say(self, *parts: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Send a message: in a packet, or in a file if it is too large."""
        message = b"\0".join(parts)
        if len(message) <= init.PACKET_BYTES:
            socket.send_fds(self.control, [message], list(descriptors))
            return
        with open(os.memfd_create("message"), "wb", buffering=0) as file:
            file.write(message)
            socket.send_fds(self.control, [init.BY_REFERENCE], [file.fileno(), *descriptors])

    def hear(self) -> list[bytes]:
        """The next message."""
        return self.control.recv(16384).split(b"\0")

    def run(self, command: str) -> list[bytes]:
        """Run a command to its end; the message that says so."""
        self.say(b"run", b"1", b"", command.encode())
        return self.hear()

    def keep(self, number: bytes, command: str) -> int:
        """Start a kept command; the read end of the pipe that is its output."""
        mine, theirs = os.pipe()
        with open(os.devnull) as nothing:
            self.say(b"keep", number, b"", command.encode(), descriptors=(nothing.fileno(), theirs, theirs))
        os.close(theirs)
        assert self.hear() == [b"done", number, b""]
        return mine

    def printed(self) -> bytes:
        """What commands have printed since the last look."""
        return os.read(self.output, 65536)


@pytest.fixture(scope="module", params=["compiled", "python"])
def compiled(request: pytest.FixtureRequest) -> bool:
    """Which of the two inits is spoken to."""
    if request.param == "compiled" and (shutil.which("cc") is None or compile_init.compile_init() is not None):
        pytest.skip("there is no C compiler")
    return request.param == "compiled"


@pytest.fixture
def talk(compiled: bool, tmp_path: Path) -> Iterator[Talk]:
    talk = Talk(tmp_path, compiled)
    yield talk
    talk.control.close()
    talk.process.wait(20)
    os.close(talk.output)


def test_it_reports_what_it_is(talk: Talk) -> None:
    facts = dict(line.split(":\t", 1) for line in talk.facts.splitlines() if ":\t" in line)
    assert facts["Pid"] == "1"
    assert facts["Box-Interfaces"].split() == ["lo+"]
    assert facts["Box-Workspace"] == "1"
    assert facts["Namespace-pid"] != os.readlink("/proc/self/ns/pid")


def test_a_command_gets_its_streams_limits_and_variables(talk: Talk) -> None:
    talk.say(
        b"run",
        b"7",
        b"",
        b"LANG=xx",
        b"NEW=a=b",
        b'echo "$0 $# $LANG $NEW $LD_PRELOAD"; ulimit -n; ls /proc/self/fd | wc -l; exit 3',
    )
    assert talk.hear() == [b"exit", b"7", b"3"]
    assert talk.printed() == b"sh 0 xx a=b \n4096\n4\n"


def test_a_kept_command_outlives_others_with_what_it_starts(talk: Talk, tmp_path: Path) -> None:
    output = talk.keep(b"2", "(sleep 1000 & echo $! > daemon; setsid sleep 1000 &) ; echo started; exec sleep 1000")
    assert os.read(output, 100) == b"started\n"
    assert talk.run("sleep 1001 & (setsid sleep 1002 &) ; exit 4") == [b"exit", b"1", b"4"]
    assert talk.run("ps -eo args | grep '[s]leep' | sort") == [b"exit", b"1", b"0"]
    assert talk.printed().decode().split("\n") == ["sleep 1000", "sleep 1000", "sleep 1000", ""]
    talk.say(b"kill", b"2")
    assert talk.hear() == [b"exit", b"2", b"137"]
    assert talk.run("! ps -eo args | grep '[s]leep'") == [b"exit", b"1", b"0"]
    assert os.read(output, 100) == b""


def test_a_message_in_a_file_brings_its_descriptors(talk: Talk) -> None:
    mine, theirs = os.pipe()
    with open(os.devnull) as nothing:
        variables = [b"V%d=%s" % (number, b"x" * 100) for number in range(300)]
        command = b"echo $V299; ls /proc/self/fd | wc -l"
        talk.say(b"keep", b"2", b"", *variables, command, descriptors=(nothing.fileno(), theirs, theirs))
    os.close(theirs)
    assert [talk.hear(), talk.hear()] == [[b"done", b"2", b""], [b"exit", b"2", b"0"]]
    assert os.read(mine, 1000) == b"x" * 100 + b"\n4\n"
    os.close(mine)


def test_the_time_of_an_environment_is_linear(talk: Talk) -> None:
    """Of the shell that begins with it, which the kernel counts in nanoseconds."""

    def seconds(count: int) -> float:
        times = []
        for _ in range(3):
            talk.say(b"run", b"1", b"", *[b"%x=" % number for number in range(count)], b"cat /proc/$$/schedstat")
            assert talk.hear() == [b"exit", b"1", b"0"]
            times.append(int(talk.printed().split()[0]) / 1e9)
        return min(times)

    # Of ten times as many variables: the fork and the shell itself take most of the time.
    assert seconds(5000) < 10 * seconds(500)


def test_the_time_of_a_search_among_processes_is_linear(talk: Talk, tmp_path: Path) -> None:
    """Of a kept command with a long line of descendants, which are told from strangers after each command."""
    (tmp_path / "line").write_text("if [ $1 -gt 0 ]; then sh line $(($1 - 1)); else echo there; read end; fi\n:\n")
    times = []
    for number, count in ((b"2", 60), (b"3", 1000)):
        (end, more), (mine, output) = os.pipe(), os.pipe()
        with open(os.devnull) as nothing:
            talk.say(b"keep", number, b"", b"sh line %d" % count, descriptors=(end, output, nothing.fileno()))
        assert talk.hear() == [b"done", number, b""]
        assert os.read(mine, 100) == b"there\n"
        init_pid = init.descendants(talk.process.pid)[0]
        start = linux.processor_time(init_pid)
        for _ in range(10):
            assert talk.run("true") == [b"exit", b"1", b"0"]
        times.append(linux.processor_time(init_pid) - start)
        talk.say(b"kill", number)
        assert talk.hear()[:2] == [b"exit", number]
        for descriptor in (end, more, mine, output):
            os.close(descriptor)
    assert times[1] < 40 * times[0]


def test_a_kept_command_can_be_interrupted(talk: Talk) -> None:
    output = talk.keep(b"2", "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.01; done")
    assert os.read(output, 100) == b"ready\n"
    talk.say(b"interrupt", b"2")
    assert talk.hear() == [b"exit", b"2", b"5"]
    assert os.read(output, 100) == b"caught\n"


def test_the_end_of_a_kept_command_takes_its_processes_along(talk: Talk) -> None:
    output = talk.keep(b"2", "(setsid sleep 1000 &) ; kill -KILL $$")
    assert talk.hear() == [b"exit", b"2", b"137"]
    assert os.read(output, 100) == b""
    assert talk.run("! ps -eo args | grep '[s]leep'") == [b"exit", b"1", b"0"]


def test_nobody_outruns_the_search(talk: Talk) -> None:
    output = talk.keep(b"2", "exec sleep 1000")
    script = "import os; os.setsid(); [os.fork() and os._exit(0) for _ in iter(int, 1)]"
    talk.run(f'python3 -c "{script}" & sleep 0.3')
    talk.say(b"run", b"3", b"", b"! ps -eo args | grep '[s]etsid'")
    # Either the runner was caught, or everybody had to go and the kept command with it.
    heard = [talk.hear()]
    if heard[0][1] == b"2":
        heard.append(talk.hear())
    assert heard[-1] == [b"exit", b"3", b"0"], heard
    os.close(output)


def test_too_many_kept_commands_are_refused(talk: Talk) -> None:
    outputs = [talk.keep(b"%d" % number, "exec sleep 1000") for number in range(2, 2 + init.MOST_KEPT)]
    with open(os.devnull) as nothing:
        talk.say(b"keep", b"99", b"", b"true", descriptors=(nothing.fileno(),) * 3)
    assert talk.hear()[:2] == [b"error", b"99"]
    for output in outputs:
        os.close(output)


def test_it_enters_another_workspace(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    talk.say(b"enter", b"3", os.fsencode(tmp_path / "other"))
    assert talk.hear() == [b"done", b"3", b""]
    talk.run("pwd")
    assert talk.printed().decode().strip() == str(tmp_path / "other")
    talk.say(b"enter", b"4", b"/nowhere")
    assert talk.hear() == [b"error", b"4", b"No such file or directory"]


def test_it_listens_inside(talk: Talk) -> None:
    talk.say(b"listen", b"3", b"8118")
    packet, descriptors, _, _ = socket.recv_fds(talk.control, 100, 1)
    assert packet == b"done\x003\x00"
    with socket.socket(fileno=descriptors[0]) as listening:
        code = "import socket; socket.create_connection(('127.0.0.1', 8118)).sendall(b'hello')"
        talk.say(b"run", b"5", b"", f'python3 -c "{code}"'.encode())
        caller, _ = listening.accept()
        with caller:
            assert caller.recv(10) == b"hello"
        assert talk.hear() == [b"exit", b"5", b"0"]
        talk.say(b"listen", b"6", b"8118")
        assert talk.hear()[:2] == [b"error", b"6"]


def test_a_command_that_is_killed_takes_its_processes_along(talk: Talk) -> None:
    talk.say(b"run", b"8", b"", b"trap '' INT TERM; sleep 1000 & sleep 1000")
    talk.say(b"kill", b"8")
    assert talk.hear() == [b"exit", b"8", b"137"]
    assert talk.run("! ps -eo args | grep '[s]leep'") == [b"exit", b"1", b"0"]
