"""The `tmux` tool in a real box."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_image.protocol import RECORDING_PATH
from sandbox_image.tools.recording import MAX_RECORDING_BYTES, Recording
from sandbox_image.tools.tmux_pane import is_key_name
from tests.sandbox_image.running import Api, RunningServer, all_started, becomes, running, someone_runs
from tests.support.growth import slowest
from tests.support.users import ORDINARY_USER, USERS
from tests.support.waiting import PATIENCE_S

if shutil.which("tmux") is None:
    pytest.skip("tmux is not installed", allow_module_level=True)

pytestmark = pytest.mark.any_user

# Logs each byte that it is given, and says when a text has come to its end.
TYPEWRITER = """
import os, termios, tty
mode = termios.tcgetattr(0)
tty.setraw(0)
print("ready", end="\\r\\n", flush=True)
taken = b""
while not taken.endswith(b"\\x1c\\x1c"):
    taken += os.read(0, 65536)
open("typed.new", "wb").write(taken[:-2])
os.rename("typed.new", "typed")
termios.tcsetattr(0, termios.TCSANOW, mode)
"""


@pytest_asyncio.fixture
async def terminal(api: Api) -> Api:
    """A client of a slot whose terminal is there."""
    await api.tmux("start")
    return api


async def command(api: Api, line: str, **options: float) -> str:
    """Type a command line, wait for its end, and return what the terminal shows then."""
    result = await api.tmux("send_keys", keys=[line, "Enter"], block=True, **options)
    assert not result["metadata"]["timeout"], result
    return str(result["output"])


async def events(api: Api, **options: object) -> list[list[object]]:
    """What `stream` gives."""
    return [json.loads(line) for line in (await api.tmux("stream", **options))["output"].splitlines()]


@pytest.mark.both_users
async def test_a_terminal_from_start_to_stop(api: Api) -> None:
    await api.output("mkdir -p 'a b'")
    # An environment that is larger than a message to the init.
    variables = {"COLOUR": "ü", **{f"V{number}": "x" * 100 for number in range(300)}}
    started = await api.tmux("start", pane_width=61, pane_height=7, cwd="a b", env=variables)
    assert started["output"] == "/workspace/a b$"
    assert [started["metadata"][name] for name in ("pane_width", "pane_height", "cursor")] == [61, 7, [16, 0]]
    assert (await command(api, "tty >/dev/null && stty size; echo $COLOUR $TMUX$TMUX_PANE")).endswith(
        "\n7 61\nü\n/workspace/a b$"
    )
    shown = await command(api, "seq 1 20")
    assert shown.splitlines() == [*map(str, range(15, 21)), "/workspace/a b$"]
    whole = (await api.tmux("capture", history=True))["output"].splitlines()
    assert whole[-21:] == [*map(str, range(1, 21)), "/workspace/a b$"]
    assert whole[0].startswith("/workspace/a b$ tty")
    assert (await api.tool("tmux", {"action": "start"}))["error"].startswith("the terminal is running already")
    await api.tmux("stop")
    assert (await api.tool("tmux", {"action": "capture"}))["error"] == "there is no terminal; `start` one first"
    assert await api.output("ls -A /tmp /run") == "/run:\n\n/tmp:\n"


async def test_block_waits_for_the_prompt_and_for_nothing_else(terminal: Api) -> None:
    """What takes as long as it may says that its time was over: nothing of this does, but where that is asked for."""
    shown = await command(terminal, "sleep 0.5; echo slept; PS1='\\w\\$ '; false")
    assert shown.endswith("slept\n/workspace$")
    for line in ("cd /tmp", "true", "echo '$ '", "/bin/sh -c 'sleep 0.2'", "PS1='> '", "stty -echo", "stty echo"):
        await command(terminal, line)
    start = time.monotonic()
    busy = await terminal.tmux("send_keys", keys=["sleep 1000", "Enter"], block=True, max_wait_s=0.4)
    assert busy["metadata"]["timeout"]
    assert time.monotonic() - start >= 0.4
    interrupted = await terminal.tmux("send_keys", keys="C-c", block=True)
    assert (interrupted["metadata"]["timeout"], interrupted["output"].endswith("sleep 1000\n^C\n>")) == (False, True)
    late = await terminal.tmux("send_keys", keys=["sleep 1000", "Enter"], block=True, timeout=1.0)
    assert late["metadata"]["timeout"]


async def test_min_wait(terminal: Api) -> None:
    start = time.monotonic()
    shown = await terminal.tmux("send_keys", keys=["sleep 0.1; echo slept", "Enter"], min_wait_s=0.6)
    assert time.monotonic() - start >= 0.6
    assert "\nslept\n" in shown["output"]


async def test_keys_and_text(terminal: Api) -> None:
    shown = await terminal.tmux(
        "send_keys",
        keys=["nonsense", "C-a", "C-k", "printf '%s.' ", "Space", "Entex", "BSpace", "r Up 'C-c'", "Left", "Enter"],
        block=True,
    )
    assert shown["output"].endswith("\nEnter.Up.C-c./workspace$")
    await terminal.tmux("send_keys", keys=["Enter"], block=True)
    texts = ["printf '[%s]' ", "Up ", "C-c ", "'Enter ; ", "-x ", "$HOME ", '" #{pane_id} ', "%0 ", "\\n", "' ;"]
    typed = await terminal.tmux("send_keys", keys=texts, literal=True)
    assert typed["output"].endswith("printf '[%s]' Up C-c 'Enter ; -x $HOME \" #{pane_id} %0 \\n' ;")
    shown = await terminal.tmux("send_keys", keys="Enter", block=True)
    assert shown["output"].endswith('[Up][C-c][Enter ; -x $HOME " #{pane_id} %0 \\n]/workspace$')


def test_names_of_keys() -> None:
    keys = ["Enter", "enter", "C-c", "C-M-x", "M-Enter", "S-F5", "^d", "PgUp", "KP7", "C-;", "M-'", "Space"]
    assert [key for key in keys if not is_key_name(key)] == []
    texts = ["", "a", "^", "ls", "Enter ", "C-", "C-cc", "Enter\n", "F13", "0x41", "Any", "MouseDown1Pane", "C-é", "é", "^é"]
    assert [text for text in texts if is_key_name(text)] == []


async def shows(api: Api, end: str) -> None:
    """Wait until the terminal shows this at its end."""
    async with asyncio.timeout(PATIENCE_S):
        while not (await api.tmux("capture"))["output"].endswith(end):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def typed(api: Api, *keys: str) -> bytes:
    """The bytes that a program is given when these are typed as text."""
    await api.tool("write_file", {"path": "typewriter.py", "content": TYPEWRITER})
    await api.output("rm -f typed")
    await api.tmux("send_keys", keys=["python3 typewriter.py", "Enter"])
    await shows(api, "ready")
    await api.tmux("send_keys", keys=[*keys, "\x1c\x1c"], literal=True, block=True)
    content = await api.tool("read_file", {"path": "typed", "encoding": "base64"})
    assert content["success"], content
    await api.tmux("send_keys", keys=["clear", "Enter"], block=True)
    return base64.b64decode(content["output"])


@settings(max_examples=4, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=80).filter(lambda text: "\x1c" not in text))
async def test_any_text_arrives_byte_for_byte(typewriter: Api, text: str) -> None:
    assert await typed(typewriter, text) == text.encode()


@pytest_asyncio.fixture
async def typewriter(visitor: Api) -> AsyncIterator[Api]:
    """A client of a slot whose terminal is there, for many examples."""
    await visitor.reset()
    await visitor.tmux("start")
    yield visitor
    await visitor.tmux("stop")


async def test_texts_that_tmux_could_misread(terminal: Api) -> None:
    texts = [
        "-l",
        "--",
        ";",
        "\\;",
        "a;",
        "'\"`$(x)#{pid}~%",
        "\n\r\t\0\x1b[A\x7f",
        "ü漢字😀e\u0301\u200d",
        "Enter",
        "C-c",
        "%end 1 2 3",
    ]
    assert await typed(terminal, *texts) == "".join(texts).encode()
    long = "0123456789abcdé" * 6000
    assert await typed(terminal, long) == long.encode()


async def test_what_a_program_shows_cannot_end_an_answer(terminal: Api) -> None:
    """All lines that could come from tmux itself, with all numbers that it could have now."""
    now = int(time.time())
    script = f"""
        for second in 0 1 2 3; do for number in $(seq 240 400); do
            echo "%end $(({now} + second)) $number 1"; echo '%output %0 forged'; echo %exit
        done; done
    """
    await terminal.tool("write_file", {"path": "forge", "content": script})
    shown = (await command(terminal, "sh forge")).splitlines()
    assert len(shown) == 24
    assert shown[-2:] == ["%exit", "/workspace$"]
    whole = (await terminal.tmux("capture", history=True))["output"].splitlines()
    assert whole.count("%output %0 forged") == 4 * 161
    assert (await command(terminal, "clear; echo fine")).startswith("fine\n")


async def test_resizing(terminal: Api) -> None:
    await terminal.tool("write_file", {"path": "watch.py", "content": (
        "import os, signal, time\n"
        "def show(*_): print('size', *os.get_terminal_size(), flush=True)\n"
        "signal.signal(signal.SIGWINCH, show)\nshow()\nwhile True: time.sleep(10)\n"
    )})  # fmt: skip
    await terminal.tmux("send_keys", keys=["python3 watch.py", "Enter"])
    await shows(terminal, "size 80 24")
    resized = await terminal.tmux("resize", pane_width=100, pane_height=30)
    assert (resized["metadata"]["pane_width"], resized["metadata"]["pane_height"]) == (100, 30)
    await shows(terminal, "size 100 30")
    await terminal.tmux("resize", pane_width=33)
    await shows(terminal, "size 80 24\nsize 100 30\nsize 33 30")
    assert [data for _, kind, data in (await events(terminal))[1:] if kind == "r"] == ["100x30", "33x30"]


async def test_stream(terminal: Api) -> None:
    header, *first = await events(terminal)
    assert isinstance(header, dict)
    assert (header["version"], header["width"], header["height"]) == (2, 80, 24)
    assert "/workspace$" in "".join(str(data) for _, _, data in first)
    assert await events(terminal) == []
    await command(terminal, "printf '\\303'; sleep 0.2; printf '\\251\\377.\\n'")
    second = await events(terminal)
    assert "é\ufffd." in "".join(str(data) for _, kind, data in second if kind == "o")
    assert await events(terminal, reset=True) == [header, *first, *second]
    pieces = await events(terminal, reset=True, max_bytes=1)
    while (piece := await terminal.tmux("stream", max_bytes=200))["metadata"]["events"]:
        assert len(piece["output"]) <= 200 or piece["metadata"]["events"] == 1
        pieces += [json.loads(line) for line in piece["output"].splitlines()]
    assert pieces == [header, *first, *second]
    times = [event[0] for event in (*first, *second)]
    assert times == sorted(times)


async def recording(api: Api) -> tuple[int, dict[str, object]]:
    """The artifact."""
    return await api.post("/artifacts/read", {"slot_id": api.slot, "path": RECORDING_PATH, "lease": api.lease})


async def test_the_recording_is_an_artifact(api: Api) -> None:
    assert (await recording(api))[0] == 404
    await api.tmux("start", pane_width=40, pane_height=5)
    await command(api, "echo first; rm -rf /tmp/* /recordings")
    await api.tmux("stop")
    await api.tmux("start", pane_width=50, pane_height=6)
    await command(api, "echo second")
    status, content = await recording(api)
    assert status == 200
    lines = [json.loads(line) for line in str(content["content"]).splitlines()]
    assert (lines[0]["width"], lines[0]["height"]) == (40, 5)
    assert [line[2] for line in lines[1:] if line[1] == "r"] == ["50x6"]
    printed = "".join(line[2] for line in lines[1:] if line[1] == "o")
    assert printed.index("first\r\n") < printed.index("\x1bc") < printed.index("second\r\n")
    assert (await events(api, reset=True, max_bytes=1_000_000)) == lines
    assert (await api.post("/artifacts/read", {"slot_id": api.slot, "path": RECORDING_PATH, "max_bytes": 10}))[0] == 413
    await api.reset()
    assert (await recording(api))[0] == 404


async def test_floods_are_shown_and_not_kept(terminal: Api) -> None:
    other = Api(terminal.session, "slot_1")
    alone = await slowest(lambda: other.output("echo quick"), count=10)
    await terminal.tmux("send_keys", keys=["yes 'a long line that says yes' & sleep 0.7; kill $!", "Enter"])
    assert await slowest(lambda: other.output("echo quick"), count=10) < 20 * alone + 0.5
    await terminal.tmux("send_keys", keys=["clear", "Enter"], block=True)
    shown = await command(terminal, "echo end")
    assert shown.endswith("end\n/workspace$")
    status, content = await recording(terminal)
    assert (status, int(str(content["size"])) <= MAX_RECORDING_BYTES) == (200, True)


def test_a_recording_ends_when_it_is_full() -> None:
    recording = Recording()
    recording.start(80, 24, "tmux")
    for _ in range(MAX_RECORDING_BYTES // 1000):
        recording.output(b"\x1b" * 1000)
    content = recording.content()
    assert recording.full
    assert MAX_RECORDING_BYTES - 20_000 < len(content) <= MAX_RECORDING_BYTES
    assert all(json.loads(line) for line in content.splitlines())


async def test_the_end_of_its_shell_is_the_end_of_a_terminal(terminal: Api) -> None:
    recorded = []
    # On a busy machine tmux may end before it has passed on what it has shown last.
    for _ in range(3):
        ended = await terminal.tmux("send_keys", keys=["exit", "Enter"], block=True)
        assert ended["metadata"]["terminal_ended"]
        assert (await terminal.tool("tmux", {"action": "capture"}))["error"] == "there is no terminal; `start` one first"
        recorded.append(str(await events(terminal)))
        assert (await terminal.tmux("start"))["output"] == "/workspace$"
    assert any("exit" in recording for recording in recorded)


@pytest.mark.both_users
async def test_it_stays_between_calls_and_ends_with_a_reset(terminal: Api, marker: str) -> None:
    await terminal.tmux("send_keys", keys=[f"(setsid sleep {marker} &); sleep {marker}", "Enter"])
    assert await becomes(lambda: someone_runs(f"sleep {marker}"))
    await terminal.output("echo a stateless call")
    await terminal.stateful("echo a stateful call; exit")
    assert someone_runs(f"sleep {marker}")
    assert (await terminal.tmux("send_keys", keys="C-c", block=True))["output"].endswith("^C\n/workspace$")
    await terminal.reset()
    assert await becomes(lambda: not someone_runs(marker))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"action": "dance"}, "'action'"),
        ({"action": "send_keys", "keys": ["a", 1]}, "'keys' must be"),
        ({"action": "send_keys", "keys": "a", "min_wait_s": -1}, "'min_wait_s' must be between"),
        ({"action": "start", "pane_width": 0}, "'pane_width' must be between 2 and 1000"),
        ({"action": "start", "pane_height": 501}, "'pane_height' must be between"),
        ({"action": "stream", "max_bytes": 0}, "'max_bytes' must be between"),
        ({"action": "start", "window": 1}, "unknown field 'window'"),
        ({"action": "start", "env": {"A": 1}}, "'env' has the wrong type"),
    ],
)
async def test_bad_arguments(visitor: Api, arguments: dict[str, object], reason: str) -> None:
    status, answer = await visitor.post("/execute", {"slot_id": "slot_0", "tool": "tmux", "args": arguments})
    assert status == 400
    assert reason in answer["error"]


async def test_what_cannot_be_done_is_said(api: Api) -> None:
    for arguments, reason in (
        ({"action": "send_keys"}, "needs `keys`"),
        ({"action": "send_keys", "keys": []}, "needs `keys`"),
        ({"action": "resize"}, "needs `pane_width`"),
        ({"action": "start", "cwd": "missing"}, "No such file"),
        ({"action": "start", "cwd": ".."}, "outside"),
        ({"action": "start", "env": {"PATH": "/nowhere"}}, "tmux is not installed in this sandbox"),
    ):
        result = await api.tool("tmux", arguments)
        assert not result["success"]
        assert reason in result["error"]
    await api.tmux("start")
    assert "surrogate" in (await api.tool("tmux", {"action": "send_keys", "keys": "\ud800"}))["error"]
    assert "more than" in (await api.tool("tmux", {"action": "send_keys", "keys": "x" * 1_000_001}))["error"]
    assert (await command(api, "echo fine")).endswith("fine\n/workspace$")


@pytest.mark.parametrize("user", USERS)
async def test_without_isolation(user: str, marker: str) -> None:
    with running("--isolation", "none", slots=1, other_user=user == ORDINARY_USER) as server:
        api = Api.over(server)
        async with api.session:
            await api.tmux("start")
            assert "here" in await command(api, "echo he''re")
            await api.tmux("send_keys", keys=[f"setsid sleep {marker} &", "Enter"], block=True)
            assert await becomes(lambda: someone_runs(f"sleep {marker}"))
            await api.tmux("stop")
            assert not someone_runs(marker)


async def test_boxes_hold_no_more_than_they_need(api: Api, server: RunningServer) -> None:
    """Descriptors of the server are given back."""
    descriptors = f"/proc/{server.process.pid}/fd"
    await all_started(api, server)
    before = len(os.listdir(descriptors))
    for _ in range(3):
        await api.tmux("start")
        await api.stateful("true; exit")
        await api.tmux("stop")
    assert await becomes(lambda: len(os.listdir(descriptors)) <= before)
