"""A slot's life: leases, resets, layers, and boxes that break."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time

import pytest

from sandbox_image.box.box import KILL_MARGIN_S
from sandbox_image.init import descendants
from tests.sandbox_image.running import (
    Api,
    RunningServer,
    alive,
    all_started,
    becomes,
    begins,
    command_line,
    init_of,
    new_marker,
    someone_runs,
)
from tests.support.waiting import PATIENCE_S


async def slots(api: Api) -> dict[str, str]:
    _, answer = await api.get("/slots")
    return {slot["slot_id"]: slot["state"] for slot in answer["slots"]}


async def test_reset_gives_everything_anew(api: Api) -> None:
    await api.output("mkdir -p deep/er; echo x > deep/er/file; touch /tmp/file")
    old = api.lease
    state = await api.reset()
    # That depends on whether there are control groups.
    assert state.pop("memory_bytes") in (4 << 30, None)
    assert state == {"slot_id": "slot_0", "lease": api.lease, "state": "ready", "layer": None, "network": False}
    assert api.lease != old
    assert await api.output("ls -A . /tmp | wc -w") == "2\n", "the two names of the directories"


async def test_a_lease_ends_with_the_reset(api: Api) -> None:
    call = {"slot_id": "slot_0", "tool": "bash", "args": {"command": "echo run >> log"}, "lease": api.lease}
    assert (await api.post("/execute", call))[0] == 200
    await api.reset()
    assert (await api.post("/execute", call))[1]["kind"] == "lease_expired"
    for route, fields in (
        ("/artifacts/read", {"path": "log"}),
        ("/artifacts/list", {}),
        ("/artifacts/archive", {}),
        ("/layers", {"name": "stale"}),
    ):
        status, failure = await api.post(route, {"slot_id": "slot_0", "lease": call["lease"], **fields})
        assert (status, failure["kind"]) == (409, "lease_expired"), route
    assert (await api.bash("cat log"))["metadata"]["exit_code"] == 1


async def test_reset_ends_the_running_call_and_those_that_wait(api: Api, marker: str) -> None:
    call = {
        "slot_id": "slot_0",
        "tool": "bash",
        "args": {"command": f"touch begun; sleep {marker}"},
        "lease": api.lease,
        "timeout": 1000,
    }
    calls = [asyncio.create_task(api.post("/execute", call)) for _ in range(3)]
    assert await begins(api)
    assert (await slots(api))["slot_0"] == "busy"
    assert (await api.get("/health"))[1]["busy"] == 1
    await api.reset()
    answers = await asyncio.gather(*calls)
    assert {failure["kind"] for status, failure in answers} <= {"slot_failed", "lease_expired"}
    assert await becomes(lambda: not someone_runs(marker))
    assert await api.output("ls -A | wc -l") == "0\n"


async def test_resets_at_the_same_time(api: Api) -> None:
    answers = await asyncio.gather(*(api.post("/reset", {"slot_id": "slot_0"}) for _ in range(5)))
    assert [status for status, _ in answers] == [200] * 5
    await api.reset()
    assert await api.output("echo fine") == "fine\n"


async def test_reset_does_not_wait_for_deletion(api: Api, server: RunningServer) -> None:
    await api.output(
        "mkdir many; cd many; seq 1 5000 | xargs touch; cd ..; mkdir -m 0 closed;"
        "python3 -c \"import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')\nos.mkdir('shut'); os.chmod('shut', 0)\""
    )
    await api.reset()
    trash = server.data / "trash"
    assert await api.output("ls -A | wc -l") == "0\n"
    assert await becomes(lambda: not os.listdir(trash))


FROZEN = [
    " drwx------ UID",
    "d drwxr-x--- UID",
    "d/e drwxr-xr-x UID",
    "d/e/file -rw------- UID  1",
    "fifo prw-r--r-- UID  1",
    "hard -rwx--x--x UID  2",
    "link lrwxrwxrwx UID /workspace/x 1",
    "no lrwxrwxrwx UID gone 1",
    "x -rwx--x--x UID  2",
]
"""Path, mode and owner of what `test_layers` freezes; target and number of links of what is not a directory."""

FIND_FROZEN = "find . \\( -type d -printf '%P %M %U\\n' -o -printf '%P %M %U %l %n\\n' \\) | sort"


async def test_layers(api: Api) -> None:
    name = secrets.token_hex(4)
    await api.output(
        "mkdir -p d/e; echo text > d/e/file; chmod 750 d; echo run > x; chmod 711 x; ln -s /workspace/x link; ln -s gone no"
    )
    await api.output("touch -d '2001-02-03 04:05:06' d/e/file; chmod 600 d/e/file; ln x hard; mkfifo fifo")
    status, state = await api.post("/layers", {"slot_id": "slot_0", "name": name, "lease": api.lease})
    assert (status, state["layer"]) == (200, None)
    assert state["lease"] != api.lease
    assert await api.output("ls -A | wc -l") == "0\n"
    assert name in (await api.get("/layers"))[1]["layers"]
    other = Api(api.session, "slot_1")
    for reader in (other, api):
        state = await reader.reset(layer=name)
        assert state["layer"] == name
        shown = await reader.output(f"{FIND_FROZEN}; date -r d/e/file +%Y; cat d/e/file link; id -u")
        *lines, year, text, run, uid = shown.splitlines()
        assert (year, text, run) == ("2001", "text", "run")
        assert lines == [line.replace("UID", uid) for line in FROZEN]
        await reader.output("echo spoilt > d/e/file; rm x; touch new")
    await api.reset(layer=name)
    assert await api.output("cat d/e/file x; ls new 2>&1 | wc -l") == "text\nrun\n1\n"


async def test_layers_that_cannot_be(api: Api) -> None:
    name = secrets.token_hex(4)
    assert (await api.post("/layers", {"slot_id": "slot_0", "name": name}))[0] == 200
    await api.output("echo kept > file")
    status, failure = await api.post("/layers", {"slot_id": "slot_0", "name": name})
    assert (status, failure["kind"]) == (400, "bad_request")
    status, failure = await api.post("/reset", {"slot_id": "slot_0", "layer": "missing"})
    assert (status, failure["kind"]) == (404, "not_found")
    assert await api.output("cat file") == "kept\n"


async def test_a_box_that_dies_fails_until_the_reset(api: Api, server: RunningServer) -> None:
    for victim in ("init", "bubblewrap"):
        await api.reset()
        boxes = [pid for pid in server.inits() if os.getpgid(pid)]
        marker = new_marker()
        running = asyncio.create_task(api.post("/execute", {
            "slot_id": "slot_0", "tool": "bash", "args": {"command": f"setsid sleep {marker} & sleep {marker}"}, "timeout": 60,
        }))  # fmt: skip
        assert await becomes(lambda marker=marker: someone_runs(f"sleep {marker}"))
        init = next(pid for pid in boxes if _runs_below(pid, marker))
        os.kill(init if victim == "init" else _parent(init), signal.SIGKILL)
        status, failure = await running
        assert (status, failure["kind"]) == (502, "slot_failed")
        assert await becomes(lambda marker=marker: not someone_runs(marker))
        assert (await slots(api))["slot_0"] == "failed"
        for _ in range(2):
            status, failure = await api.post("/execute", {"slot_id": "slot_0", "tool": "bash", "args": {"command": "true"}})
            assert (status, failure["kind"]) == (502, "slot_failed")
            assert failure["error"].startswith("slot_0: ")
    await api.reset()
    assert await api.output("echo well") == "well\n"


@pytest.mark.any_user
async def test_an_init_that_hangs_is_given_up(api: Api, server: RunningServer) -> None:
    os.kill(await init_of(api, server), signal.SIGSTOP)
    start = time.monotonic()
    call = {"slot_id": "slot_0", "tool": "bash", "args": {"command": "true"}, "timeout": 0.3}
    status, failure = await api.post("/execute", call)
    assert (status, failure["kind"], "init did not answer" in failure["error"]) == (502, "slot_failed", True)
    assert time.monotonic() - start >= 0.3 + KILL_MARGIN_S
    await api.reset()
    assert await api.output("echo well") == "well\n"


async def test_an_idle_box_that_dies_is_noticed(api: Api, server: RunningServer) -> None:
    os.kill(await init_of(api, server), signal.SIGKILL)
    assert await _becomes(api, "failed")
    await api.reset()
    assert (await slots(api))["slot_0"] == "ready"


async def test_a_box_in_which_nothing_ran_is_kept_for_the_next_workspace(api: Api, server: RunningServer) -> None:
    name = secrets.token_hex(4)
    await api.output("echo layer > file")
    await api.post("/layers", {"slot_id": "slot_0", "name": name})
    await api.reset()
    await all_started(api, server)
    boxes = set(server.inits())
    for layer, listing in ((name, "file\n"), (None, ""), (name, "file\n")):
        lease = api.lease
        await api.reset(layer=layer)
        assert api.lease != lease
        _, shown = await api.post("/artifacts/list", {"slot_id": "slot_0"})
        assert "".join(f"{entry['path']}\n" for entry in shown["entries"]) == listing
        assert set(server.inits()) == boxes
    used = await init_of(api, server)
    assert used in boxes
    await api.output("ls; echo mine > mine; test -e file")
    await api.reset()
    assert await api.output("ls") == ""
    assert await init_of(api, server) not in (used, None)


async def test_a_reset_needs_no_box_that_was_started_ahead(api: Api, server: RunningServer) -> None:
    await all_started(api, server)
    in_use = [await init_of(Api(api.session, slot), server) for slot in ("slot_0", "slot_1")]
    for pid in server.inits():
        if pid not in in_use:
            os.kill(pid, signal.SIGKILL)
            assert await becomes(lambda pid=pid: not alive(pid))
    await api.reset()
    assert await api.output("echo well; ls") == "well\n"
    assert (await slots(api))["slot_0"] == "ready"
    # One reset after another, so that none is ready.
    for number in range(5):
        await api.output(f"echo {number} > file{number}")
        await api.reset()
        assert await api.output("ls; pwd") == "/workspace\n"


async def test_a_slot_full_of_processes_can_be_reset(api: Api) -> None:
    await api.reset()
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    running = asyncio.create_task(api.post("/execute", {
        "slot_id": "slot_0", "tool": "bash", "args": {"command": f"python3 -c '{bomb}'"}, "timeout": 60,
    }))  # fmt: skip
    # A box for the reset cannot be started meanwhile.
    await asyncio.sleep(0.4)
    await api.reset()
    assert (await running)[0] in (409, 502)
    assert await api.output("echo well; ls -A") == "well\n"


async def test_many_resets_leave_no_process_or_descriptor(api: Api, server: RunningServer) -> None:
    def held() -> tuple[int, int]:
        return len(server.processes()), len(os.listdir(f"/proc/{server.process.pid}/fd"))

    await all_started(api, server)
    before = held()
    for _ in range(12):
        await api.reset()
        await api.output("sleep 100 & true")
    assert await becomes(lambda: held() <= before), (before, held())


async def _becomes(api: Api, state: str) -> bool:
    for _ in range(int(PATIENCE_S / 0.02)):
        if (await slots(api))["slot_0"] == state:
            return True
        await asyncio.sleep(0.02)
    return False


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def _runs_below(init: int, marker: str) -> bool:
    return any(marker in command_line(pid) for pid in descendants(init))
