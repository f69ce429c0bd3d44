"""The `bash_stateful` tool in a real box."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_image.protocol import MAX_OUTPUT_BYTES
from tests.sandbox_image.running import Api, RunningServer, becomes, running, someone_runs
from tests.support.users import ORDINARY_USER, USERS

pytestmark = pytest.mark.any_user


async def said(api: Api, command: str, **options: Any) -> str:
    """The output of a command that must succeed in the shell that was there."""
    result = await api.stateful(command, **options)
    assert result["success"], result
    assert not result["metadata"]["shell_restarted"], result
    return str(result["output"])


@pytest.mark.both_users
async def test_state_stays(api: Api) -> None:
    await said(
        api, "mkdir -p a/b && cd a/b; word='two words'; export LOUD=yes; greet() { echo hello $1; }; alias ll='echo listed'"
    )
    assert await said(api, "pwd; echo \"$word\"; sh -c 'echo $LOUD'; greet you; ll") == (
        "/workspace/a/b\ntwo words\nyes\nhello you\nlisted\n"
    )
    await said(api, "set -o pipefail; exec 7< <(echo from seven); umask 077")
    assert await said(api, "cat <&7; umask; false | true || echo piped") == "from seven\n0077\npiped\n"
    assert (await api.stateful("(exit 7)"))["metadata"]["exit_code"] == 7
    assert await said(api, "echo $?; echo $?") == "7\n0\n"


async def test_virtual_environments_stay(api: Api) -> None:
    await said(api, "python3 -m venv --without-pip env && . env/bin/activate")
    assert await said(api, "python -c 'import sys; print(sys.prefix)'") == "/workspace/env\n"
    await said(api, "deactivate")
    assert "/workspace" not in await said(api, "command -v python3")


@pytest.mark.both_users
async def test_the_start_of_a_shell(api: Api) -> None:
    await api.output("mkdir -p 'a b'")
    assert await said(api, "pwd; echo $COLOUR", cwd="a b", env={"COLOUR": "ü"}) == "/workspace/a b\nü\n"
    assert await said(api, "pwd; echo $COLOUR", cwd=".", env={"COLOUR": "x"}) == "/workspace/a b\nü\n", "it runs already"
    await api.reset()
    # An environment that is larger than a message to the init.
    variables = {f"V{number}": "x" * 100 for number in range(300)}
    assert await said(api, "echo $V299 | wc -c; set | grep -c ^V", env=variables) == "101\n300\n"
    await api.reset()
    for cwd, reason in (("..", "outside"), ("missing", "")):
        result = await api.stateful("pwd", cwd=cwd)
        assert not result["success"]
        assert reason in result["error"]
    assert await said(api, "pwd") == "/workspace\n"


async def test_the_result_is_that_of_bash(api: Api) -> None:
    result = await api.stateful("echo one; echo two >&2; printf three")
    assert (result["success"], result["output"], result["error"]) == (True, "one\ntwo\nthree", None)
    result["metadata"].pop("oom_killed", None)
    assert result["metadata"] | {"duration_s": 0} == {
        "exit_code": 0, "timeout": False, "truncated": False, "output_bytes": 13, "duration_s": 0, "sandboxed": True,
        "shell_restarted": False, "shell_ended": False, "shell_replaced": False,
    }  # fmt: skip
    failed = await api.stateful("cat; exit_here() { return 3; }; exit_here")
    assert (failed["success"], failed["output"], failed["error"]) == (False, "", "exit status 3")
    assert (await api.stateful("no-such-program"))["metadata"]["exit_code"] == 127


UNRULY = [
    "PS1=marker PS2=marker PS4=marker PROMPT_COMMAND='echo prompted' PS0='begun '",
    "exec >/dev/null 2>&1",
    "exec 1>&- 2>&-",
    "exec </etc/passwd; read line",
    "exec 3>&1 1>/tmp/elsewhere; echo lost",
    'for number in 3 4 5 6 7 8 9; do eval "exec $number>&-"; done',
    "python3 -c 'import os; os.set_blocking(1, False)'",
    "stty -echo; stty raw",
    "echo 'unterminated",
    "cat <<END\nno end",
    "if true; then",
    ")",
    "return 3",
    "set -C; set -f; set -u",
    "set -o posix",
    "IFS=0123456789/",
    "trap 'echo trapped' DEBUG EXIT; false",
    "trap 'false' ERR; set -E; false",
    "trap '' TERM HUP PIPE",
    "printf() { echo fooled; }; eval() { :; }; exit() { :; }; source() { :; }; read() { :; }",
    "alias printf=false command=false .=false exit=true '{'=false",
    "echo $((1 / 0)); echo not reached",
    "echo ${unset?is not set}; echo not reached",
    "readonly PPID_OF_MINE=1; PPID_OF_MINE=2",
    "shopt -s extglob failglob; shopt -u expand_aliases",
    "x=$(head -c 300000 /dev/zero | tr '\\0' x)",
    "cd /; unset PWD OLDPWD PATH; PATH=/usr/bin:/bin",
]


@pytest.mark.parametrize("unruly", UNRULY)
async def test_no_command_spoils_the_next(visitor: Api, unruly: str) -> None:
    await visitor.reset()
    await said(visitor, "kept=yes")
    await visitor.stateful(unruly)
    assert await said(visitor, "echo out; echo err >&2; echo $kept") == "out\nerr\nyes\n"
    failed = await visitor.stateful("echo partial; sh -c 'exit 42'")
    assert (failed["output"], failed["metadata"]["exit_code"]) == ("partial\n", 42)


async def test_traces_are_output(api: Api) -> None:
    assert await said(api, "set -x; echo traced") == "++ echo traced\ntraced\n"
    assert await said(api, "echo more; set +x") == "++ echo more\nmore\n++ set +x\n"


@pytest.mark.both_users
async def test_reports_cannot_be_forged(api: Api) -> None:
    forge = 'for fd in /proc/$PPID/fd/* /proc/$$/fd/*; do echo "0 ended 0" > $fd; done 2>/dev/null'
    forged = await api.stateful(f"{forge}; echo end; (exit 9)")
    assert forged["metadata"]["exit_code"] == 9
    assert forged["output"].endswith("end\n")
    assert await said(api, "echo fine") == "fine\n"


@pytest.mark.both_users
async def test_any_text_is_a_command(api: Api) -> None:
    assert await said(api, "printf %s 'ä\t\"$x\\n😀'; echo !! !x") == 'ä\t"$x\\n😀!! !x\n'
    assert "NUL" in (await api.stateful("echo a\0b"))["error"]
    assert "surrogate" in (await api.stateful("echo \ud800"))["error"]
    for size in (60_000, 131_072, 3_000_000):
        assert await said(api, f"cat <<'END' | wc -c\n{'x' * size}\nEND\necho $#") == f"{size + 1}\n0\n"
    assert await said(api, "") == ""
    assert await said(api, "# nothing") == ""


async def test_output_is_bounded_while_it_is_read(api: Api) -> None:
    result = await api.stateful("echo first; yes | head -c 50000000; echo last")
    assert (result["metadata"]["output_bytes"], result["metadata"]["truncated"]) == (50_000_011, True)
    assert result["output"].startswith("first\ny\n")
    assert result["output"].endswith("\ny\nlast\n")
    assert len(result["output"]) < MAX_OUTPUT_BYTES + 100
    assert (await api.stateful("seq 1 1000", max_output_bytes=20))["output"].endswith("\n999\n1000\n")


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), status=st.integers(0, 255))
async def test_output_and_status_are_those_of_bash(visitor: Api, content: bytes, status: int) -> None:
    escaped = "".join(f"\\{byte:03o}" for byte in content)
    command = f"printf '{escaped}'; sh -c 'exit {status}'"
    kept, fresh = await visitor.stateful(command), await visitor.bash(command)
    names = ("exit_code", "timeout", "truncated", "output_bytes")
    assert [kept[name] for name in ("success", "output", "error")] == [fresh[name] for name in ("success", "output", "error")]
    assert [kept["metadata"][name] for name in names] == [fresh["metadata"][name] for name in names]
    assert (kept["metadata"]["output_bytes"], kept["metadata"]["exit_code"]) == (len(content), status)


# What a job in the background does once a file is there; a file says that it has been done.
WHEN = "while ! test -e {file}; do sleep 0.01; done; {command}; touch {file}.done"
WAIT = "while ! test -e {file}.done; do sleep 0.01; done"


@pytest.mark.both_users
async def test_background_jobs_stay_and_their_output_is_told_apart(api: Api, marker: str) -> None:
    late = f"{WHEN.format(file='one', command='echo late')}; {WHEN.format(file='two', command='echo later')}"
    assert await said(api, f"sleep {marker} & ({late}) & echo now") == "now\n"
    assert await becomes(lambda: someone_runs(f"sleep {marker}"))
    next_one = await api.stateful(f"touch one; {WAIT.format(file='one')}; echo mine")
    assert (next_one["output"], next_one["metadata"]["background_output"]) == ("mine\n", "late\n")
    await api.output("touch two; " + WAIT.format(file="two"))
    assert someone_runs(f"sleep {marker}"), "a stateless call in between does not end it"
    last = await api.stateful("kill %1 && wait %1; echo ended $?")
    assert (last["output"], last["metadata"]["background_output"]) == ("ended 143\n", "later\n")
    assert "background_output" not in (await api.stateful("true"))["metadata"]


async def test_more_jobs_than_pipes(api: Api) -> None:
    for number in range(8):
        await said(api, f"({WHEN.format(file='all', command=f'echo job {number}')}; touch done.{number}) & echo call {number}")
    result = await api.stateful("touch all; while [ $(ls done.* | wc -l) -lt 8 ]; do sleep 0.01; done 2>/dev/null; echo end")
    everything = result["output"] + result["metadata"].get("background_output", "")
    assert sorted(everything.split("\n")) == sorted(["", "end", *(f"job {number}" for number in range(8))])
    assert result["output"].endswith("end\n")


async def test_floods_from_the_background_are_bounded(api: Api) -> None:
    await said(api, "yes & true")
    # Of another call, so that some of the flood comes meanwhile.
    result = await api.stateful("sleep 0.2; kill %1; wait; echo end")
    assert result["output"] == "end\n"
    assert 10_000 < len(result["metadata"]["background_output"]) < 21_000


async def test_a_stateless_call_still_leaves_nothing(api: Api, marker: str) -> None:
    await said(api, f"sleep {marker}1 &")
    await api.output(f"setsid sleep {marker}2 & while ! pgrep -f '[s]leep {marker}2'; do :; done")
    assert not someone_runs(f"sleep {marker}2")
    assert await becomes(lambda: someone_runs(f"sleep {marker}1"))


@pytest.mark.parametrize(
    "stuck",
    [
        "sleep {stuck}; echo after",
        "while :; do :; done; echo after",
        "sleep {stuck} | cat; echo after",
        "value=$(sleep {stuck}); echo after",
        "for number in 1 2 3; do sleep {stuck}; done; echo after",
        "python3 -c 'import time; time.sleep({stuck})' 2>/dev/null; echo after",
        "timeout 99 sleep {stuck}; echo after",
    ],
)
async def test_a_timeout_interrupts_and_keeps_the_shell(visitor: Api, marker: str, stuck: str) -> None:
    await visitor.reset()
    await said(visitor, f"kept=yes; sleep {marker} & cd /tmp")
    result = await visitor.stateful("echo before; " + stuck.format(stuck=f"{marker}1"), timeout=0.3)
    assert (result["success"], result["output"]) == (False, "before\n")
    assert result["error"] == "timed out after 0.3 s; the command was interrupted, the shell goes on"
    metadata = result["metadata"]
    assert (metadata["timeout"], metadata["exit_code"], metadata["shell_replaced"]) == (True, None, False)
    assert await said(visitor, "echo $? $kept; pwd; kill -0 %1 && echo job") == "130 yes\n/tmp\njob\n"
    assert await becomes(lambda: not someone_runs(f"{marker}1"))


async def test_only_a_shell_that_cannot_be_interrupted_is_replaced(api: Api, marker: str) -> None:
    await said(api, "kept=yes")
    result = await api.stateful(f"trap '' INT; while :; do sleep {marker}; done", timeout=0.3)
    assert result["error"] == "timed out after 0.3 s; the command could not be interrupted, so its shell was killed"
    assert (result["metadata"]["timeout"], result["metadata"]["shell_replaced"]) == (True, True)
    assert not someone_runs(f"sleep {marker}")
    fresh = await api.stateful("echo [$kept]")
    assert (fresh["output"], fresh["metadata"]["shell_restarted"]) == ("[]\n", True)
    assert await said(api, "echo and on") == "and on\n"


@pytest.mark.parametrize(
    ("ending", "output", "status"),
    [
        ("echo bye; exit 5", "bye\n", 5),
        ("exit", "", 0),
        ("trap 'echo trapped' EXIT; exit 3", "trapped\n", 3),
        ("set -e; false; echo not reached", "", 1),
        ("exec sh -c 'echo other; exit 4'", "other\n", 4),
        ("echo last words; kill -9 $$", "last words\n", 137),
    ],
)
async def test_a_shell_that_ends_is_reported_and_replaced(visitor: Api, ending: str, output: str, status: int) -> None:
    await visitor.stateful("kept=yes")
    result = await visitor.stateful(ending)
    assert (result["output"], result["metadata"]["exit_code"], result["success"]) == (output, status, status == 0)
    assert (result["metadata"]["shell_ended"], result["metadata"]["shell_replaced"]) == (True, False)
    fresh = await visitor.stateful("echo [$kept]")
    assert (fresh["output"], fresh["metadata"]["shell_restarted"], fresh["metadata"]["shell_ended"]) == ("[]\n", True, False)


async def test_a_shell_that_ends_between_calls_loses_no_command(api: Api) -> None:
    """Its descriptors are all used up, or it is killed meanwhile: the command runs, once, in a fresh shell."""
    for ending, meanwhile in (("ulimit -n 3; echo $$", "true"), ("echo $$", "kill -9 {0}; while kill -0 {0}; do :; done")):
        shell = (await api.stateful(ending))["output"].strip()
        await api.output(f"{meanwhile.format(shell)} 2>/dev/null")
        result = await api.stateful("echo ran >> log; echo out")
        assert (result["output"], result["metadata"]["shell_restarted"]) == ("out\n", True)
    assert await api.output("cat log") == "ran\nran\n"


@pytest.mark.both_users
async def test_a_reset_kills_it(api: Api, marker: str) -> None:
    running_call = asyncio.create_task(api.session.post("/execute", json=_sleep(api.slot, marker)))
    assert await becomes(lambda: someone_runs(f"sleep {marker}"))
    await api.reset()
    assert (await running_call).status == 502
    assert await becomes(lambda: not someone_runs(f"sleep {marker}"))
    result = await api.stateful("echo [$kept]")
    assert (result["output"], result["metadata"]["shell_restarted"]) == ("[]\n", False)


async def test_calls_take_turns(api: Api) -> None:
    results = await asyncio.gather(*(api.stateful(f"total=$((total + 1)); echo {number}") for number in range(5)))
    assert sorted(result["output"] for result in results) == [f"{number}\n" for number in range(5)]
    assert await said(api, "echo $total") == "5\n"


async def test_slots_have_shells_of_their_own(api: Api) -> None:
    other = Api(api.session, "slot_1")
    await other.reset()
    await said(api, "name=first")
    await said(other, "name=second")
    assert (await said(api, "echo $name"), await said(other, "echo $name")) == ("first\n", "second\n")


@pytest_asyncio.fixture(params=USERS)
async def unconfined(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    """A client of a server without isolation."""
    with running("--isolation", "none", slots=1, other_user=request.param == ORDINARY_USER) as server:
        api = Api.over(server)
        async with api.session:
            yield api


async def test_without_isolation(unconfined: Api, marker: str) -> None:
    await said(unconfined, f"kept=yes; sleep {marker} &")
    await unconfined.output("true")
    assert await said(unconfined, "echo $kept; kill -0 %1 && echo job") == "yes\njob\n"
    assert not (await unconfined.stateful("true"))["metadata"]["sandboxed"]
    await unconfined.reset()
    assert not someone_runs(f"sleep {marker}")


def _sleep(slot: str, marker: str) -> dict[str, Any]:
    return {"slot_id": slot, "tool": "bash_stateful", "args": {"command": f"kept=yes; sleep {marker}"}, "timeout": 60}


async def test_a_sandbox_without_bash(server: RunningServer, api: Api) -> None:
    """The shell is then the one that every system has."""
    await api.output("mkdir programs; for name in sleep cat sh; do ln -s /bin/$name programs/$name; done")
    env = {"PATH": "/workspace/programs"}
    assert await said(api, "kept=yes; greet() { echo hello; }; cd /tmp; echo ${BASH_VERSION-none}", env=env) == "none\n"
    assert await said(api, "echo $kept; greet; pwd") == "yes\nhello\n/tmp\n"
    assert (await api.stateful("sleep 99; echo after", timeout=0.3))["output"] == ""
    assert await said(api, "echo $kept") == "yes\n"
    assert (await api.stateful("no-such-program"))["metadata"]["exit_code"] == 127
    assert (await api.stateful("echo 'unterminated"))["metadata"]["exit_code"] == 2
    assert (await api.stateful("exit 4"))["metadata"]["exit_code"] == 4
    assert (await api.stateful("echo [$kept]"))["output"] == "[]\n"
