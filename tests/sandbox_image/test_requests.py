"""What a client may send: nothing of it may cost more than an error."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox_image.running import Api, RunningServer, command_line, open_directory, running
from tests.support.waiting import PATIENCE_S

GOOD: dict[str, Any] = {"slot_id": "slot_0", "tool": "bash", "args": {"command": "true"}}
ROUTES = ["/execute", "/batch", "/reset", "/layers", "/artifacts/read", "/artifacts/list", "/artifacts/archive"]


pytestmark = pytest.mark.any_user


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"NaN",
        b"1" * 5000,
        b'"text"',
        b"null",
        b"7",
        b"\0",
    ],
    ids=["empty", "cut", "word", "bytes", "deep list", "deep object", "nan", "digits", "string", "null", "number", "nul"],
)
async def test_bodies_that_are_not_requests(visitor: Api, route: str, body: bytes) -> None:
    async with visitor.session.post(route, data=body) as response:
        failure = json.loads(await response.read())
        assert (response.status, failure["kind"]) == (400, "bad_request"), failure
    assert (await visitor.get("/health"))[0] == 200


@pytest.mark.parametrize(
    ("route", "payload"),
    [
        ("/execute", {}),
        ("/execute", {**GOOD, "extra": 1}),
        ("/execute", {**GOOD, "slot_id": 0}),
        ("/execute", {**GOOD, "slot_id": ["slot_0"]}),
        ("/execute", {**GOOD, "tool": None}),
        ("/execute", {**GOOD, "tool": "rm"}),
        ("/execute", {**GOOD, "args": []}),
        ("/execute", {**GOOD, "args": {}}),
        ("/execute", {**GOOD, "args": {"command": 1}}),
        ("/execute", {**GOOD, "args": {"command": "true", "shell": "zsh"}}),
        ("/execute", {**GOOD, "args": {"command": "true", "env": {"A": 1}}}),
        ("/execute", {**GOOD, "args": {"command": "true", "env": ["A"]}}),
        ("/execute", {**GOOD, "args": {"command": "true", "max_output_bytes": 0}}),
        ("/execute", {**GOOD, "args": {"command": "true", "max_output_bytes": 10**9}}),
        ("/execute", {**GOOD, "tool": "read_file"}),
        ("/execute", {**GOOD, "tool": "read_file", "args": {"path": "x", "encoding": "latin-1"}}),
        ("/execute", {**GOOD, "tool": "read_file", "args": {"path": "x", "max_bytes": True}}),
        ("/execute", {**GOOD, "tool": "write_file", "args": {"path": "x"}}),
        ("/execute", {**GOOD, "timeout": 0}),
        ("/execute", {**GOOD, "timeout": -1}),
        ("/execute", {**GOOD, "timeout": "5"}),
        ("/execute", {**GOOD, "timeout": True}),
        ("/execute", {**GOOD, "timeout": 10**30}),
        ("/execute", {**GOOD, "timeout": float("nan")}),
        ("/execute", {**GOOD, "timeout": float("inf")}),
        ("/execute", {**GOOD, "execution_id": 5}),
        ("/execute", {**GOOD, "execution_id": "x" * 2000}),
        ("/execute", {**GOOD, "lease": 1}),
        ("/batch", GOOD),
        ("/reset", {"slot_id": "slot_0", "network": "yes"}),
        ("/reset", {"slot_id": "slot_0", "layer": 1}),
        ("/layers", {"slot_id": "slot_0"}),
        ("/layers", {"slot_id": "slot_0", "name": ""}),
        ("/layers", {"slot_id": "slot_0", "name": "../x"}),
        ("/layers", {"slot_id": "slot_0", "name": ".."}),
        ("/layers", {"slot_id": "slot_0", "name": "a\n"}),
        ("/layers", {"slot_id": "slot_0", "name": "x" * 129}),
        ("/artifacts/read", {"slot_id": "slot_0"}),
        ("/artifacts/read", {"slot_id": "slot_0", "path": "x", "max_bytes": -1}),
        ("/artifacts/read", {"slot_id": "slot_0", "path": "x", "max_bytes": 10**12}),
        ("/artifacts/list", {"slot_id": "slot_0", "recursive": 1}),
        ("/artifacts/archive", {"slot_id": "slot_0", "format": "zip"}),
    ],
)
async def test_requests_that_make_no_sense(visitor: Api, route: str, payload: object) -> None:
    status, failure = await visitor.post(route, payload)
    assert (status, failure["kind"]) == (400, "bad_request"), failure
    assert failure["error"]
    assert "\n" not in failure["error"]


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "/batch"])
async def test_unknown_slots(visitor: Api, route: str) -> None:
    fields = {
        "/execute": {"tool": "bash", "args": {"command": "true"}},
        "/layers": {"name": "x"},
        "/artifacts/read": {"path": "x"},
    }
    for slot in ("slot_2", "slot_-1", "", "slot_0/../slot_1"):
        status, failure = await visitor.post(route, {"slot_id": slot, **fields.get(route, {})})
        assert (status, failure["kind"]) == (404, "not_found")


async def test_unknown_routes(visitor: Api) -> None:
    for method, path in (("GET", "/"), ("GET", "/execute"), ("POST", "/health"), ("PUT", "/reset"), ("GET", "/../etc/passwd")):
        async with visitor.session.request(method, path) as response:
            assert (response.status, json.loads(await response.read())["kind"]) == (404, "not_found")


async def test_too_large(visitor: Api, server: RunningServer) -> None:
    status, failure = await visitor.post("/batch", [GOOD] * 1001)
    assert (status, failure["kind"]) == (413, "too_large")

    answer = await asyncio.to_thread(upload, server.socket, 130 * 2**20)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["kind"] == "too_large"


def upload(path: str, size: int) -> bytes:
    """Send a request with a body of blanks; what comes back."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(b"POST /execute HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
        try:
            for _ in range(size // 2**20):
                connection.sendall(b" " * 2**20)
        except ConnectionError:
            # The server has answered without waiting for the rest.
            pass
        return connection.makefile("rb").read()


async def test_bytes_that_are_not_http(server: RunningServer) -> None:
    for garbage in (
        b"\0" * 100,
        b"GET\r\n\r\n",
        b"POST /execute HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"A" * 100_000 + b"\r\n\r\n",
    ):
        reader, writer = await asyncio.open_unix_connection(server.socket)
        writer.write(garbage)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        await writer.wait_closed()
    api = Api.over(server)
    async with api.session:
        assert (await api.get("/health"))[0] == 200


async def test_a_client_that_leaves_does_not_matter(api: Api, server: RunningServer) -> None:
    body = json.dumps({**GOOD, "args": {"command": "sleep 0.2; echo done > file"}}).encode()
    _, writer = await asyncio.open_unix_connection(server.socket)
    writer.write(b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    assert await api.output("cat file") == "done\n"


async def test_batch_keeps_order_and_hides_no_good_item(api: Api) -> None:
    def item(slot: str, command: str, **more: Any) -> dict[str, Any]:
        return {"slot_id": slot, "tool": "bash", "args": {"command": command}, **more}

    items = [
        item("slot_0", "sleep 0.3; echo a >> log", execution_id="first"),
        item("slot_1", "echo other"),
        {"nonsense": True, "execution_id": "odd"},
        item("slot_9", "true", execution_id="lost"),
        item("slot_0", "echo b >> log; cat log"),
        item("slot_1", "exit 5"),
        7,
        item("slot_0", "true", lease="old"),
    ]
    status, answers = await api.post("/batch", items)
    assert status == 200
    assert [answer.get("kind") for answer in answers] == [
        None,
        None,
        "bad_request",
        "not_found",
        None,
        None,
        "bad_request",
        "lease_expired",
    ]
    assert (answers[0]["execution_id"], answers[2]["execution_id"], answers[3]["execution_id"]) == ("first", "odd", "lost")
    assert (answers[1]["output"], answers[4]["output"], answers[5]["metadata"]["exit_code"]) == ("other\n", "a\nb\n", 5)
    assert await api.post("/batch", []) == (200, [])


async def test_batch_streams_each_result_when_it_is_there(api: Api, server: RunningServer) -> None:
    items = [
        {"slot_id": "slot_0", "tool": "bash", "args": {"command": "while ! test -e go; do sleep 0.01; done; echo slow"}},
        {"slot_id": "slot_1", "tool": "bash", "args": {"command": "echo quick"}},
        {"slot_id": "slot_7", "tool": "bash", "args": {"command": "true"}},
    ]
    lines = []
    async with api.session.post("/batch", json=items, headers={"Accept": "application/x-ndjson"}) as response:
        assert response.content_type == "application/x-ndjson"
        async for line in response.content:
            lines.append(json.loads(line))
            if len(lines) == 2:
                # The slow one waits until the two others have been answered.
                (server.workspace() / "go").touch()
    by_index = {line["index"]: line for line in lines}
    assert sorted(by_index) == [0, 1, 2]
    assert lines[-1]["index"] == 0
    assert (by_index[0]["result"]["output"], by_index[1]["result"]["output"]) == ("slow\n", "quick\n")
    assert (by_index[2]["result"], by_index[2]["failure"]["kind"]) == (None, "not_found")


async def test_a_streamed_batch_survives_its_client(api: Api) -> None:
    items = [
        {"slot_id": "slot_0", "tool": "bash", "args": {"command": f"sleep 0.2; echo {n} >> log"}, "execution_id": f"item {n}"}
        for n in range(3)
    ]
    lease = api.lease
    async with api.session.post("/batch", json=items, headers={"Accept": "application/x-ndjson"}) as response:
        await response.content.readline()
        response.close()
    status, answers = await api.post("/batch", items)
    assert (status, [answer["execution_id"] for answer in answers]) == (200, ["item 0", "item 1", "item 2"])
    assert lease == api.lease
    assert await api.output("cat log") == "0\n1\n2\n"


async def test_an_execution_runs_once(api: Api) -> None:
    name = secrets.token_hex(4)
    call = {**GOOD, "args": {"command": "sleep 0.2; echo run >> log; cat log"}, "execution_id": name}
    both = await asyncio.gather(api.post("/execute", call), api.post("/execute", call))
    again = await api.post("/execute", {**call, "lease": api.lease})
    assert both[0] == both[1] == again
    assert (again[1]["execution_id"], again[1]["output"]) == (name, "run\n")
    assert (await api.post("/execute", {**call, "execution_id": f"{name}-2"}))[1]["output"] == "run\nrun\n"
    await api.reset()
    assert (await api.post("/execute", call))[1]["output"] == "run\n"


async def test_remembered_executions_are_bounded(api: Api) -> None:
    first = {**GOOD, "args": {"command": "echo x >> log"}, "execution_id": "the first"}
    await api.post("/execute", first)
    for start in (0, 600):
        items = [
            {"slot_id": "slot_1", "tool": "read_file", "args": {"path": "."}, "execution_id": f"{start + n}"}
            for n in range(600)
        ]
        assert (await api.post("/batch", items))[0] == 200
    await api.post("/execute", first)
    assert await api.output("cat log") == "x\nx\n"


def shown_of(pid: int) -> str:
    """What every user, or the same one, can see of a process."""
    return command_line(pid) + Path(f"/proc/{pid}/environ").read_text(errors="replace")


async def test_token() -> None:
    token = secrets.token_urlsafe(16)
    with open_directory() as directory:
        file = directory / "token"
        file.write_text(f"{token}\n")
        with running("--token-file", str(file), slots=1) as server:
            api = Api.over(server)
            async with api.session:
                for headers in (
                    {},
                    {"Authorization": f"Bearer {token}x"},
                    {"Authorization": token},
                    {"Authorization": "Bearer ü"},
                ):
                    for method, route in (
                        ("GET", "/health"),
                        ("POST", "/execute"),
                        ("GET", "/nowhere"),
                        ("POST", "/artifacts/read"),
                    ):
                        async with api.session.request(method, route, headers=headers) as response:
                            assert (response.status, json.loads(await response.read())["kind"]) == (401, "unauthorized")
                async with api.session.get("/health", headers={"Authorization": f"Bearer {token}"}) as response:
                    assert response.status == 200
                assert not [pid for pid in server.processes() if token in shown_of(pid)]
