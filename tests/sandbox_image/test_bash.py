"""The `bash` tool in a real box."""

from __future__ import annotations

import asyncio
import os

import pytest

from sandbox_image.protocol import MAX_OUTPUT_BYTES
from tests.sandbox_image.running import Api, RunningServer, alive, begins, init_of, someone_runs
from tests.support.growth import slowest

FLOOD_BYTES = 300 * 2**20 + 11


async def test_output_is_one_stream_in_order(api: Api) -> None:
    result = await api.bash("echo one; echo two >&2; echo three")
    assert result["output"] == "one\ntwo\nthree\n"
    assert (result["success"], result["error"]) == (True, None)
    metadata = result["metadata"]
    assert (metadata["exit_code"], metadata["timeout"], metadata["truncated"]) == (0, False, False)
    assert (metadata["output_bytes"], metadata["sandboxed"]) == (14, True)


async def test_output_can_be_opened_by_name(api: Api) -> None:
    assert (
        await api.output("echo one > /dev/stderr; echo two > /dev/stdout; echo three > /proc/self/fd/2") == "one\ntwo\nthree\n"
    )


async def test_exit_status(api: Api) -> None:
    failed = await api.bash("exit 3")
    assert (failed["success"], failed["error"], failed["metadata"]["exit_code"]) == (False, "exit status 3", 3)
    assert (await api.bash("kill -TERM $$"))["metadata"]["exit_code"] == 143
    assert (await api.bash("no-such-program"))["metadata"]["exit_code"] == 127


async def test_stdin_is_empty(api: Api) -> None:
    assert await api.output("cat; readlink /proc/self/fd/0") == "/dev/null\n"


async def test_each_call_has_a_fresh_shell_in_the_workspace(api: Api) -> None:
    await api.output("cd /tmp; export COLOUR=red; echo kept > /workspace/file")
    assert await api.output("pwd; echo [$COLOUR]; cat file") == "/workspace\n[]\nkept\n"


async def test_working_directory(api: Api) -> None:
    await api.output("mkdir -p 'a b/c'")
    assert await api.output("pwd", cwd="a b/c") == "/workspace/a b/c\n"
    assert await api.output("pwd", cwd="/workspace/a b") == "/workspace/a b\n"
    assert await api.output("pwd") == "/workspace\n"
    for cwd, reason in (("missing", "No such file"), ("..", "outside"), ("/etc", "outside"), ("a\0b", "NUL")):
        result = await api.bash("pwd", cwd=cwd)
        assert not result["success"]
        assert reason in result["error"]


async def test_environment_is_ours_alone(api: Api) -> None:
    names = {line.split("=")[0] for line in (await api.output("env")).splitlines()}
    assert names == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "PWD"}
    assert await api.output('printf "%s" "$WORD$TERM"', env={"WORD": "ü=x ", "TERM": "other"}) == "ü=x other"
    for env in ({"": "x"}, {"A=B": "x"}, {"A": "\0"}, {"A": "x" * 70_000}):
        result = await api.bash("env", env=env)
        assert not result["success"]
        assert result["error"].startswith("env")


async def test_any_text_is_a_command(api: Api) -> None:
    assert await api.output("printf %s 'ä\t\"$x\\n😀'") == 'ä\t"$x\\n😀'
    assert "NUL" in (await api.bash("echo a\0b"))["error"]
    assert "surrogate" in (await api.bash("echo \ud800"))["error"]
    assert await api.output("printf '\\377abc'") == "\ufffdabc"


async def test_commands_larger_than_an_argument(api: Api) -> None:
    for size in (60_000, 131_071, 131_072, 3_000_000):
        text = "x" * size
        assert await api.output(f"cat <<'END' | wc -c\n{text}\nEND\necho $#") == f"{size + 1}\n0\n"


async def test_nothing_survives_a_call(api: Api, marker: str) -> None:
    stubborn = f"signal.pthread_sigmask(0, range(1, 60)); time.sleep({marker})"
    await api.output(
        f"sleep {marker} & setsid sleep {marker} & (setsid nohup sleep {marker} >/dev/null 2>&1 &)\n"
        f"sleep {marker} & kill -STOP $!\n"
        f"python3 -c 'import os, signal, time; os.fork() and os._exit(0); {stubborn}' & sleep 0.3"
    )
    assert not someone_runs(marker)
    assert await api.output("ls /proc | grep -c '^[0-9]'") == "4\n", "init, sh, ls and grep"


async def test_fork_storm_is_stopped(api: Api) -> None:
    result = await api.bash("f() { f | f & }; f; sleep 1000", timeout=0.5)
    assert result["metadata"]["timeout"] or not result["success"] or result["output"]
    assert await api.output("echo well") == "well\n"


async def test_timeout(api: Api, marker: str) -> None:
    result = await api.bash(f"trap '' TERM INT; echo before; setsid sleep {marker} & sleep {marker}", timeout=0.4)
    assert (result["success"], result["error"], result["output"]) == (False, "timed out after 0.4 s", "before\n")
    assert (result["metadata"]["timeout"], result["metadata"]["exit_code"]) == (True, None)
    assert not someone_runs(marker)
    assert await api.output("echo next") == "next\n"


@pytest.mark.any_user
async def test_flood_is_cut_while_it_is_read(api: Api, server: RunningServer) -> None:
    before = _resident(server.process.pid)
    result = await api.bash("echo first; yes | head -c 300M; echo last")
    assert _resident(server.process.pid) - before < 60_000_000
    assert result["metadata"].pop("oom_killed", False) is False
    assert result["metadata"] | {"duration_s": 0} == {
        "exit_code": 0, "timeout": False, "truncated": True, "output_bytes": FLOOD_BYTES, "duration_s": 0, "sandboxed": True,
    }  # fmt: skip
    assert result["output"].startswith("first\ny\n")
    assert result["output"].endswith("\ny\nlast\n")
    assert len(result["output"]) < MAX_OUTPUT_BYTES + 100
    assert f"[... {FLOOD_BYTES - MAX_OUTPUT_BYTES} bytes dropped ...]" in result["output"]


async def test_output_limit_of_a_call(api: Api) -> None:
    result = await api.bash("seq 1 1000", max_output_bytes=20)
    assert result["output"] == "1\n2\n3\n4\n5\n\n[... 3873 bytes dropped ...]\n\n999\n1000\n"
    whole = await api.bash("printf äöü", max_output_bytes=6)
    assert (whole["output"], whole["metadata"]["truncated"]) == ("äöü", False)
    cut = await api.bash("printf ääääää", max_output_bytes=6)
    assert cut["output"] == "ä\n[... 6 bytes dropped ...]\nä"


@pytest.mark.any_user
async def test_a_flood_does_not_stop_other_slots(api: Api) -> None:
    other = Api(api.session, "slot_1")
    alone = await slowest(lambda: other.output("echo quick"), count=10)
    flood = asyncio.create_task(api.bash("touch begun; yes", timeout=0.7))
    assert await begins(api)
    beside = await slowest(lambda: other.output("echo quick"), count=10, during=flood)
    assert (await flood)["metadata"]["timeout"]
    assert beside < 20 * alone + 0.5


async def test_non_blocking_output_does_not_leak_into_the_next_call(api: Api) -> None:
    await api.output("python3 -c 'import os; os.set_blocking(1, False)'")
    assert len(await api.output("python3 -c 'print(\"x\" * 900000)'")) == 900_001


async def test_calls_of_a_slot_run_one_after_the_other(api: Api) -> None:
    commands = [f"echo start {n} >> log; sleep 0.05; echo end {n} >> log" for n in range(4)]
    await asyncio.gather(*map(api.output, commands))
    lines = (await api.output("cat log")).split("\n")[:-1]
    assert [lines[i].split()[1] for i in range(0, 8, 2)] == [lines[i].split()[1] for i in range(1, 8, 2)]


async def test_processes_of_a_box_die_with_their_parent_only(api: Api, server: RunningServer) -> None:
    own = await init_of(api, server)
    await api.bash("kill -9 -1")
    assert alive(own)
    assert await api.output("echo here") == "here\n"
    assert (await api.bash("kill -9 1; kill -INT 1; kill -TERM 1; echo no"))["output"] == "no\n"


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
