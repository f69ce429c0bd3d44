"""Attacks by processes: outliving a call, hanging it, and taking all there are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.sandbox_image.running import Api, begins, eventually
from tests.security.attack import Attack, python, takes
from tests.security.field import Field, field_of
from tests.security.sites import BoxWithout, Outside
from tests.security.table import each, hold, still_works
from tests.support.users import ORDINARY_USER, USERS
from tests.support.waiting import PATIENCE_S

PROCESSES = 300


@pytest.fixture(scope="module", params=USERS)
def field(request: pytest.FixtureRequest) -> Iterator[Field]:
    """A server whose slots have few processes."""
    with field_of("--processes", str(PROCESSES), other_user=request.param == ORDINARY_USER) as field:
        yield field


_DAEMON = """
def daemon(seconds, work):
    "Leave the call behind: its session, its parent, its signals, its descriptors."
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            os.closerange(0, 100)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                work()
        os._exit(0)
    os.wait()
"""


ATTACKS = [
    Attack(
        "standard output kept open", "delays the answer for ever", "sleep 9 & echo done", Outside(), takes(8), control_s=0.5
    ),
    Attack(
        "standard output kept open by a daemon",
        "delays the answer for ever",
        python("""
        if os.fork() == 0:
            os.setsid()
            time.sleep(9)
            os._exit(0)
        judge(False)
        """),
        Outside(),
        takes(8),
        control_s=0.5,
    ),
]


@each(ATTACKS)
async def test_attack(field: Field, attack: Attack) -> None:
    await hold(field, attack)


async def outlived(api: Api, command: str) -> bool:
    """Whether what a command has started goes on afterwards: it touches `alive` again and again."""
    await api.bash(command)
    return (await api.bash("rm -f alive; sleep 0.1; test -e alive"))["success"]


async def outlives_outside(field: Field, command: str) -> bool:
    """The control. A daemon lives for seconds, which a busy machine may let pass before anybody looks: it is tried again."""
    for _ in range(3):
        place = field.new_directory(None)
        place.chmod(0o777)
        await Outside(directory=place).strike(Attack("", "", command, Outside(), control_s=0.5), field)
        (place / "alive").unlink(missing_ok=True)
        if await asyncio.to_thread(eventually, (place / "alive").exists, 10.0):
            return True
    return False


TOUCH = "open('alive', 'w').close(); time.sleep(0.02)"
SURVIVORS = {
    "a background job": "(for i in $(seq 150); do touch alive; sleep 0.02; done) > /dev/null 2>&1 &",
    "a session of its own": "setsid sh -c 'for i in $(seq 150); do touch alive; sleep 0.02; done' > /dev/null 2>&1 &",
    "a daemon": python(f"daemon(3, lambda: exec({TOUCH!r}))", _DAEMON),
    "a daemon under another name": python(f"""
        libc.prctl(15, b"kthreadd", 0, 0, 0)
        daemon(3, lambda: exec({TOUCH!r}))
        """, _DAEMON),
    "a stopped process that wakes up": python("""
        def work():
            open("alive", "w").close()
            sleeper = os.fork()
            if sleeper == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
                os._exit(0)
            time.sleep(0.05)
            os.kill(sleeper, signal.SIGCONT)
        daemon(1, work)
        """, _DAEMON),
    "a process that forks away from its killer": python("""
        # Each is alive for a moment only: who kills those that he has seen in a list always comes too late.
        if os.fork() == 0:
            os.setsid()
            os.closerange(0, 100)
            end = time.monotonic() + 3
            while time.monotonic() < end:
                open("alive", "w").close()
                if os.fork():
                    os._exit(0)
        """),
    "a child of a subreaper": python(f"""
        libc.prctl(36, 1, 0, 0, 0)
        daemon(3, lambda: exec({TOUCH!r}))
        """, _DAEMON),
    "a traced process": python(f"""
        def work():
            {TOUCH}
        if os.fork() == 0:
            libc.ptrace(0, 0, 0, 0)
            daemon(3, work)
        """, _DAEMON),
}  # fmt: skip


async def test_outliving_a_call(field: Field) -> None:
    """What a stateless call has started is gone when it answers."""
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        controls = await asyncio.gather(*(outlives_outside(field, command) for command in SURVIVORS.values()))
        assert dict(zip(SURVIVORS, controls, strict=True)) == dict.fromkeys(SURVIVORS, True)
        for name, command in SURVIVORS.items():
            assert not await outlived(api, command), name


async def test_outliving_a_trajectory(field: Field) -> None:
    """What a shell that stays has started goes on from call to call, and is gone with the slot's reset."""
    api = Api.over(field.server)
    async with api.session:
        for way in ("&", "& disown", "& trap '' HUP TERM INT"):
            await api.reset()
            job = f"setsid sh -c 'while :; do touch $HOME/alive /workspace/alive; sleep 0.02; done' > /dev/null 2>&1 {way}"
            await api.tool("bash_stateful", {"command": job}, timeout=PATIENCE_S)
            # The control: the next call, of either tool, finds it running.
            assert (await api.bash("rm -f alive; sleep 0.15; test -e alive"))["success"]
            processes = await api.output("echo /proc/[0-9]* | wc -w")
            await api.reset()
            assert not (await api.bash("sleep 0.1; ls /workspace/alive $HOME/alive"))["success"]
            assert int(await api.output("echo /proc/[0-9]* | wc -w")) < int(processes)
    await still_works(field)


async def test_a_command_that_does_not_want_to_end(field: Field) -> None:
    """A polite request to end is ignored; being killed is not a choice."""
    stubborn = "trap '' TERM INT HUP QUIT PIPE ALRM; while :; do sleep 0.05; done"
    control = await asyncio.create_subprocess_exec("sh", "-c", stubborn, start_new_session=True)
    await asyncio.sleep(0.1)
    control.terminate()
    await asyncio.sleep(0.1)
    assert control.returncode is None
    control.kill()
    await control.wait()
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        # If one of them were not killed, its box would be, and the call would fail.
        for command in (stubborn, f"({stubborn}) & kill -STOP $$", "exec 0<&- 1>&- 2>&-; while :; do :; done"):
            result = await api.bash(command, timeout=0.3)
            assert (result["metadata"]["timeout"], result["success"]) == (True, False)
        assert int(await api.output("echo /proc/[0-9]* | wc -w")) < 6


FORK = python(
    """
    count = 0
    try:
        while count < int(os.environ["BOUND"]):
            if libc.fork() == 0:
                libc.pause()
                os._exit(0)
            count += 1
            if ctypes.get_errno() == errno.EAGAIN:
                break
    finally:
        judge(count >= int(os.environ["BOUND"]), count)
        os.killpg(0, signal.SIGKILL)
    """
)


async def test_too_many_processes(field: Field) -> None:
    """A fork bomb ends at the limit of its own slot, and the other slot does not notice."""
    bound = PROCESSES + 50
    attack = Attack("a fork bomb", "takes all processes", f"export BOUND={bound}; {FORK}", Outside())
    control = await Outside().strike(attack, field)
    assert "BREACH" in control.text
    one, two = Api.over(field.server), Api.over(field.server)
    two.slot = "slot_1"
    async with one.session, two.session:
        await one.reset()
        await two.reset()
        assert (await one.get("/health"))[1]["limits"]["rlimit_nproc"] < bound
        bomb = asyncio.create_task(one.bash("touch begun; f() { f | f & }; f; f; f; while :; do sleep 1; done", timeout=0.8))
        assert await begins(one)
        assert await two.output("echo fine; (sleep 0 & wait); ls | wc -l") == "fine\n0\n"
        # A shell that cannot fork may give up before its time is over.
        assert not (await bomb)["success"]
        assert await one.output("echo fine") == "fine\n"
        counted = await one.bash(attack.script)
        assert "BREACH" not in counted["output"]
        assert int(await one.output("echo /proc/[0-9]* | wc -w")) < 6


async def test_zombies_do_not_pile_up(field: Field) -> None:
    """Dead children that nobody waits for count as processes; PID 1 has to take them."""
    orphans = "for i in $(seq 120); do (sh -c : &) ; done; sleep 0.2; "
    count = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"
    # The control: a PID 1 that does not care.
    careless = BoxWithout(added=("--as-pid-1",))
    control = await careless.strike(
        Attack("", "", "exec " + python(f"""
            import subprocess
            subprocess.run(["sh", "-c", {orphans!r}])
            print(subprocess.run(["sh", "-c", {count!r}], capture_output=True, text=True).stdout)
            """), careless), field)  # fmt: skip
    assert int(control.text) > 60
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        for _ in range(2):
            assert int((await api.output(orphans + count)).split()[-1]) < 50
        assert int(await api.output(count)) == 0
    await still_works(field)
