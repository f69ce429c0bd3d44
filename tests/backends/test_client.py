"""The client against a server that lies: nothing but the protocol's exceptions may come out, and memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from backends.client import EncodedCall, SlotServerClient
from backends.errors import (
    ArtifactForbiddenError,
    ArtifactNotFoundError,
    ArtifactTooLargeError,
    ExecutionTimeoutError,
    SandboxError,
    SandboxProtocolError,
    SandboxUnavailableError,
    SlotLostError,
    SnapshotError,
)
from sandbox_image.protocol import (
    ArtifactArchiveRequest,
    ArtifactListRequest,
    ArtifactReadRequest,
    ErrorKind,
    ExecuteRequest,
    ExecutionResult,
    FreezeRequest,
    ResetRequest,
)

Start = Callable[..., Awaitable[Any]]
RESULT = {"success": True, "output": "hi", "error": None, "execution_id": "one", "metadata": {"exit_code": 0}}


def call(execution_id: str | None = "one", *, slot_id: str = "slot_0", timeout: float = 30.0) -> EncodedCall:
    return EncodedCall.of(ExecuteRequest(slot_id, "bash", {"command": "true"}, execution_id, timeout, "lease"))


def failure(kind: str, error: str = "the reason") -> dict[str, str]:
    return {"kind": kind, "error": error}


async def test_a_result_comes_back_as_a_message(lying_server: Start) -> None:
    server = await lying_server(lambda visit: visit.answer(RESULT))
    assert await server.client.execute(call()) == ExecutionResult(True, "hi", None, "one", {"exit_code": 0})
    assert server.visits[0].payload == {
        "slot_id": "slot_0",
        "tool": "bash",
        "args": {"command": "true"},
        "execution_id": "one",
        "timeout": 30.0,
        "lease": "lease",
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"null",
        b"[]",
        b"1" * 10_000,
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"success": true}',
        b'{"success": 1, "output": ""}',
        b'{"success": true, "output": ["x"], "execution_id": "one"}',
        b'{"success": true, "output": "", "execution_id": "one", "surprise": 1}',
        b'{"success": true, "output": "", "execution_id": "another"}',
        b'{"success": true, "output": "", "execution_id": "one", "metadata": []}',
    ],
)
async def test_garbage_in_a_result_is_a_protocol_error(lying_server: Start, body: bytes) -> None:
    server = await lying_server(lambda visit: visit.answer(body))
    with pytest.raises(SandboxProtocolError):
        await server.client.execute(call())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"garbage\r\n\r\n", SandboxProtocolError),
        (b"HTTP/1.1 abc OK\r\n\r\n", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", SandboxError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", SandboxUnavailableError),
        (b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nno header\r\n\r\n", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}XX", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n", SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 100_000, SandboxProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}", SandboxUnavailableError),
        (b"", SandboxUnavailableError),
    ],
)
async def test_what_is_not_http_is_a_sandbox_error(lying_server: Start, raw: bytes, expected: type[SandboxError]) -> None:
    async def reply(visit: Any) -> None:
        await visit.send(raw)
        visit.hang_up()

    server = await lying_server(reply)
    with pytest.raises(expected):
        await server.client.execute(call())


EXPECTED = {
    ErrorKind.BAD_REQUEST: (SandboxProtocolError, SandboxProtocolError),
    ErrorKind.UNAUTHORIZED: (SandboxUnavailableError, SandboxUnavailableError),
    ErrorKind.OUTSIDE_WORKSPACE: (SandboxProtocolError, ArtifactForbiddenError),
    ErrorKind.NOT_FOUND: (SandboxProtocolError, ArtifactNotFoundError),
    ErrorKind.LEASE_EXPIRED: (SlotLostError, SlotLostError),
    ErrorKind.TOO_LARGE: (SandboxProtocolError, ArtifactTooLargeError),
    ErrorKind.SLOT_FAILED: (SlotLostError, SlotLostError),
    ErrorKind.SHUTTING_DOWN: (SandboxUnavailableError, SandboxUnavailableError),
    ErrorKind.NO_ROOM: (SnapshotError, SnapshotError),
}


@pytest.mark.parametrize("kind", list(ErrorKind))
async def test_each_error_kind_is_one_exception(lying_server: Start, kind: ErrorKind) -> None:
    server = await lying_server(lambda visit: visit.answer(failure(kind.value), status=kind.status))
    of_a_call, of_an_artifact = EXPECTED[kind]
    with pytest.raises(of_a_call, match="the reason"):
        await server.client.execute(call())
    with pytest.raises(of_an_artifact, match="the reason"):
        await server.client.read_artifact(ArtifactReadRequest("slot_0", "x"))


@pytest.mark.parametrize(
    "body",
    [
        failure("KeyboardInterrupt"),
        failure("builtins.SystemExit"),
        {"kind": 3, "error": "x"},
        {"kind": "not_found"},
        "oops",
        None,
    ],
)
async def test_the_server_cannot_choose_an_exception(lying_server: Start, body: object) -> None:
    server = await lying_server(lambda visit: visit.answer(body, status=500))
    with pytest.raises(SandboxProtocolError):
        await server.client.execute(call())


async def test_text_of_the_server_is_shortened_and_harmless(lying_server: Start) -> None:
    text = "\x1b[2J\n\r\x00" + "A" * 500_000
    server = await lying_server(lambda visit: visit.answer(failure("slot_failed", text), status=502))
    with pytest.raises(SlotLostError) as caught:
        await server.client.execute(call())
    assert len(str(caught.value)) < 3000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("status", [200, 502])
async def test_an_endless_answer_is_not_kept(lying_server: Start, status: int) -> None:
    async def reply(visit: Any) -> None:
        await visit.send(f"HTTP/1.1 {status} OK\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        while not visit.writer.is_closing():
            await visit.chunk(b"x" * 1_000_000)

    server = await lying_server(reply)
    tracemalloc.start()
    try:
        with pytest.raises(SandboxProtocolError, match="longer than"):
            await server.client.execute(call())
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()


async def test_an_endless_line_in_a_batch_is_not_kept(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        await visit.start_stream()
        while not visit.writer.is_closing():
            await visit.chunk(b"x" * 1_000_000)

    server = await lying_server(reply)
    with pytest.raises(SandboxProtocolError, match="line longer than"):
        await server.client.execute_many([call(), call("two")], lambda index, outcome: None)


async def test_a_broken_connection_is_tried_once_more_with_the_same_execution_id(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        if visit.number == 0:
            visit.hang_up()
        else:
            await visit.answer(RESULT)

    server = await lying_server(reply)
    assert (await server.client.execute(call())).output == "hi"
    assert [visit.payload["execution_id"] for visit in server.visits] == ["one", "one"]


async def test_connections_are_kept(lying_server: Start) -> None:
    server = await lying_server(lambda visit: visit.answer(RESULT))
    for _ in range(5):
        await server.client.execute(call())
    assert server.connections == 1
    await asyncio.gather(*(server.client.execute(call()) for _ in range(5)))
    assert server.connections == 5


async def test_a_cancelled_call_gives_its_connection_up(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        if visit.number == 0:
            await asyncio.sleep(0.2)
            await visit.answer(RESULT | {"execution_id": "cancelled"})
        else:
            await visit.answer(RESULT)

    server = await lying_server(reply)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.client.execute(call("cancelled")), 0.1)
    assert (await server.client.execute(call())).output == "hi"
    assert server.connections == 2


async def test_a_connection_that_was_closed_while_idle_is_replaced(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        await visit.answer(RESULT | {"execution_id": None})
        visit.hang_up()

    server = await lying_server(reply)
    for _ in range(3):
        await server.client.execute(call(None))
        await asyncio.sleep(0.02)
    assert server.connections == 3


async def test_the_second_attempt_is_made_on_a_new_connection(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        if visit.number == 4:
            visit.hang_up()
        else:
            # All four at the same time, so that each has a connection of its own.
            await asyncio.sleep(0.1)
            await visit.answer(RESULT)

    server = await lying_server(reply)
    await asyncio.gather(*(server.client.execute(call()) for _ in range(4)))
    assert server.connections == 4
    assert (await server.client.execute(call())).output == "hi"
    # The second attempt was made on a new connection, not on one of those that were left.
    assert server.connections == 5


async def test_a_call_without_execution_id_is_not_repeated(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        visit.hang_up()

    server = await lying_server(reply)
    with pytest.raises(SandboxUnavailableError):
        await server.client.execute(call(None))
    assert server.routes == ["/execute"]


async def test_freezing_is_not_repeated(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        visit.hang_up()

    server = await lying_server(reply)
    with pytest.raises(SandboxUnavailableError):
        await server.client.freeze(FreezeRequest("slot_0", "layer", "lease"))
    assert server.routes == ["/layers"]


async def test_a_connection_that_keeps_breaking_is_given_up(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        visit.hang_up()

    server = await lying_server(reply)
    with pytest.raises(SandboxUnavailableError):
        await server.client.execute(call())
    assert server.routes == ["/execute", "/execute"]


async def test_nobody_there(short_path: Path) -> None:
    async with SlotServerClient(unix_socket=short_path / "socket") as client:
        with pytest.raises(SandboxUnavailableError, match="no connection"):
            await client.execute(call())


async def test_a_server_that_comes_up_late_is_reached(short_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"layers": ["a"]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async with SlotServerClient(unix_socket=short_path / "socket") as client:
        asked = asyncio.create_task(client.layers())
        await asyncio.sleep(0.1)
        async with await asyncio.start_unix_server(serve, short_path / "socket"):
            assert await asked == ["a"]


async def test_the_token_is_sent() -> None:
    seen = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.set_result((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"slots": []}')
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with SlotServerClient(url=f"http://127.0.0.1:{port}", token="secret") as client:
            assert await client.slots() == []
    assert "Authorization: Bearer secret" in await seen


async def test_a_silent_server_times_out(lying_server: Start) -> None:
    server = await lying_server(lambda visit: asyncio.sleep(5), timeout_margin_s=0.2)
    with pytest.raises(ExecutionTimeoutError, match=r"0\.1 s plus 0\.2 s"):
        await server.client.execute(call(timeout=0.1))


async def test_a_silent_server_times_out_for_each_call_of_a_batch(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        await visit.start_stream()
        await visit.line({"index": 2, "result": RESULT | {"execution_id": "c"}})
        await asyncio.sleep(60)

    server = await lying_server(reply, timeout_margin_s=0.1)
    loop = asyncio.get_running_loop()
    start, outcomes = loop.time(), {}
    calls = [call("a", timeout=0.5), call("b", slot_id="slot_1", timeout=0.1), call("c", slot_id="slot_2", timeout=0.3)]
    await server.client.execute_many(calls, lambda index, outcome: outcomes.update({index: (loop.time() - start, outcome)}))
    assert list(outcomes) == [2, 1, 0]
    assert isinstance(outcomes[2][1], ExecutionResult)
    for index, timeout in ((1, 0.1), (0, 0.5)):
        assert isinstance(outcomes[index][1], ExecutionTimeoutError)
        assert outcomes[index][0] >= timeout + 0.1


async def many(server: Any, count: int) -> dict[int, Any]:
    outcomes: dict[int, Any] = {}
    calls = [call(str(number), slot_id=f"slot_{number}") for number in range(count)]
    await server.client.execute_many(calls, lambda index, outcome: outcomes.update({index: outcome}))
    return outcomes


def batch_result(number: int) -> dict[str, Any]:
    return RESULT | {"execution_id": str(number), "output": f"output {number}"}


async def test_a_batch_hands_out_each_result_as_it_comes(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        await visit.start_stream()
        await visit.line({"index": 1, "result": batch_result(1)})
        await seen.wait()
        await visit.line({"index": 2, "failure": failure("lease_expired")})
        await visit.line({"index": 0, "result": batch_result(0)})
        await visit.chunk(b"")

    seen = asyncio.Event()
    outcomes: dict[int, Any] = {}

    def deliver(index: int, outcome: Any) -> None:
        outcomes[index] = outcome
        seen.set()

    server = await lying_server(reply)
    await server.client.execute_many([call(str(number), slot_id=f"slot_{number}") for number in range(3)], deliver)
    assert list(outcomes) == [1, 2, 0]
    assert isinstance(outcomes[2], SlotLostError)
    assert [outcomes[0].output, outcomes[1].output] == ["output 0", "output 1"]


async def test_lines_may_be_cut_anywhere(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        text = "".join(json.dumps({"index": number, "result": batch_result(number)}) + "\n" for number in range(3))
        await visit.start_stream()
        for start in range(0, len(text), 7):
            await visit.chunk(text[start : start + 7].encode())
            await asyncio.sleep(0)
        await visit.chunk(b"")

    outcomes = await many(await lying_server(reply), 3)
    assert [outcomes[number].output for number in range(3)] == ["output 0", "output 1", "output 2"]


@pytest.mark.parametrize("hang_up", [False, True])
async def test_a_batch_that_ends_early_says_so(lying_server: Start, hang_up: bool) -> None:
    async def reply(visit: Any) -> None:
        await visit.start_stream()
        await visit.line({"index": 1, "result": batch_result(1)})
        if hang_up:
            visit.hang_up()
        else:
            await visit.chunk(b"")

    server = await lying_server(reply)
    outcomes: dict[int, Any] = {}
    calls = [call(str(number), slot_id=f"slot_{number}") for number in range(3)]
    with pytest.raises(SandboxUnavailableError):
        await server.client.execute_many(calls, lambda index, outcome: outcomes.update({index: outcome}))
    assert list(outcomes) == [1]
    assert server.routes == ["/batch"]


@pytest.mark.parametrize(
    "line",
    [
        {"index": 5, "result": RESULT},
        {"index": -1, "result": RESULT},
        {"index": True, "result": RESULT},
        {"index": 0},
        {"index": 0, "result": RESULT, "failure": failure("not_found")},
        {"index": 0, "result": {"success": True}},
        {"index": 0, "result": batch_result(7)},
        {"index": 0, "failure": failure("made_up")["kind"]},
        ["index", 0],
    ],
)
async def test_a_line_that_fits_no_call_is_a_protocol_error(lying_server: Start, line: object) -> None:
    async def reply(visit: Any) -> None:
        await visit.start_stream()
        await visit.line(line)
        await visit.chunk(b"")

    server = await lying_server(reply)
    with pytest.raises(SandboxProtocolError):
        await many(server, 2)


async def test_more_lines_than_calls(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        await visit.start_stream()
        while not visit.writer.is_closing():
            await visit.line({"index": 0, "result": batch_result(0)})

    with pytest.raises(SandboxProtocolError, match="more lines"):
        await many(await lying_server(reply), 2)


@pytest.mark.parametrize("args", [{"x": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}])
def test_arguments_that_are_not_json_are_refused_before_they_are_sent(args: dict[str, Any]) -> None:
    with pytest.raises(SandboxProtocolError, match="JSON"):
        EncodedCall.of(ExecuteRequest("slot_0", "bash", args))


def test_lone_surrogates_travel() -> None:
    assert b"\\ud800" in EncodedCall.of(ExecuteRequest("slot_0", "bash", {"command": "\ud800"})).body


async def test_every_route_reads_strictly(lying_server: Start) -> None:
    server = await lying_server(lambda visit: visit.answer({"layers": [1], "slots": [2]}))
    client = server.client
    requests: list[Awaitable[object]] = [
        client.reset(ResetRequest("slot_0")),
        client.freeze(FreezeRequest("slot_0", "name")),
        client.layers(),
        client.slots(),
        client.health(),
        client.read_artifact(ArtifactReadRequest("slot_0", "x")),
        client.list_artifacts(ArtifactListRequest("slot_0")),
        client.archive_artifacts(ArtifactArchiveRequest("slot_0")),
    ]
    for outcome in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(outcome, SandboxProtocolError)


async def test_closing_ends_requests_under_way(lying_server: Start) -> None:
    server = await lying_server(lambda visit: asyncio.sleep(5))
    asked = asyncio.create_task(server.client.execute(call()))
    await asyncio.sleep(0.1)
    await server.client.close()
    with pytest.raises(SandboxUnavailableError):
        await asked
    with pytest.raises(SandboxUnavailableError, match="closed"):
        await server.client.execute(call())
