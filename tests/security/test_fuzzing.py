"""Nothing that a client sends costs more than an error: neither requests made from the API's document nor bytes of any sort."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox_image.running import Api, RunningServer, open_directory, running
from tests.security.field import Listener
from tests.security.fuzzing import SLOTS, Fuzzer
from tests.support.growth import slowest
from tests.support.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(slots=SLOTS) as server:
        yield server


REQUESTS = 700
"""The same in each run; `python -m tests.security.fuzzing` sends others, and as many as there is time for."""


def test_requests_from_the_document(server: RunningServer) -> None:
    fuzzer = Fuzzer(server)
    try:
        fuzzer.run(REQUESTS, seed_value=None)
        fuzzer.still_serves()
    finally:
        fuzzer.close()
    assert sum(fuzzer.answers.values()) >= REQUESTS
    # They came further than to the door: every kind of answer was among them.
    assert {200, 400, 403, 404, 413} <= set(fuzzer.answers), fuzzer.answers


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 400 Oh\r\nContent-Length: 2\r\n\r\n{}", b""]
)
def test_a_server_that_fails_is_found_out(server: RunningServer, answer: bytes) -> None:
    """The control: an answer that must not be is noticed, and so is none."""
    listening = socket.socket(socket.AF_UNIX)
    with open_directory() as directory:
        listening.bind(str(directory / "socket"))
        listening.listen()
        with Listener(listening, answer.decode()):
            fuzzer = Fuzzer(RunningServer(server.process, directory, server.ready))
            with pytest.raises((AssertionError, KeyError, http.client.HTTPException, OSError, ExceptionGroup)):
                fuzzer.run(20, seed_value=1)
            fuzzer.close()


def raw(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((*lines, b"", b"")) + body


POST, GET, HOST, CHUNKED = b"POST /execute HTTP/1.1", b"GET /health HTTP/1.1", b"Host: x", b"Transfer-Encoding: chunked"
MALFORMED = {
    "a chunk's size that is no number": raw(POST, HOST, CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n"),
    "a chunk larger than all memory": raw(POST, HOST, CHUNKED, body=b"ffffffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
    "a chunk that does not end": raw(POST, HOST, CHUNKED, body=b"3\r\nabcdef\r\n0\r\n\r\n"),
    "a second chunk that is none": raw(POST, HOST, CHUNKED, body=b"3\r\nabc\r\nzz\r\n\r\n"),
    "two ways of telling the length": raw(POST, HOST, CHUNKED, b"Content-Length: 3", body=b"3\r\nabc\r\n0\r\n\r\n"),
    "two lengths": raw(POST, HOST, b"Content-Length: 3", b"Content-Length: 4", body=b"abcd"),
    "a negative length": raw(POST, HOST, b"Content-Length: -3", body=b"abcd"),
    "a length beyond 64 bits": raw(POST, HOST, b"Content-Length: 99999999999999999999", body=b"abcd"),
    "a length with a sign": raw(POST, HOST, b"Content-Length: +3", body=b"abcd"),
    "a coding that nobody knows": raw(POST, HOST, b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "another version": raw(b"GET /health HTTP/9.9", HOST),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"x" * 100,
    "no host": raw(GET),
    "bare line feeds": b"GET /health HTTP/1.1\nHost: x\n\n",
    "a folded header": raw(GET, b"Host: x", b" more"),
    "a blank before the colon": raw(GET, b"Host : x"),
    "no colon": raw(GET, b"Host"),
    "a NUL in a header": raw(GET, HOST, b"X: \0"),
    "a NUL in a path": raw(b"GET /hea\0lth HTTP/1.1", HOST),
    "bytes in a path": raw(b"GET /\xff\xfe HTTP/1.1", HOST),
    "a blank in a path": raw(b"GET /a b HTTP/1.1", HOST),
    "a long path": raw(b"GET /" + b"a" * 20_000 + b" HTTP/1.1", HOST),
    "a long header": raw(GET, HOST, b"X: " + b"a" * 20_000),
    "a flood of headers": raw(GET, HOST, *(b"X-%d: y" % number for number in range(20_000))),
    "a host that is none": raw(b"GET http://[::1 HTTP/1.1", HOST),
    "a port that is none": raw(b"GET http://a:99999/health HTTP/1.1", HOST),
    "a broken query": raw(b"GET /health?%zz=%&&==\xff HTTP/1.1", HOST),
    "a tunnel": raw(b"CONNECT a:1 HTTP/1.1", HOST),
    "everything": raw(b"OPTIONS * HTTP/1.1", HOST),
    "a compressed body that is none": raw(POST, HOST, b"Content-Encoding: gzip", b"Content-Length: 2", body=b"{]"),
    "a compressed body": raw(POST, HOST, b"Content-Encoding: gzip", b"Content-Length: 22", body=gzip.compress(b"{}")),
    "a character set that nobody knows": raw(POST, HOST, b"Content-Type: text/x; charset=no", b"Content-Length: 1", body=b"]"),
    "no bytes of a body": raw(POST, HOST),
    "garbage": bytes(range(256)) * 8 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_bytes_that_are_hardly_http(server: RunningServer, name: str) -> None:
    reader, writer = await asyncio.open_unix_connection(server.socket)
    writer.write(MALFORMED[name])
    status_line = await asyncio.wait_for(reader.readline(), PATIENCE_S)
    assert status_line.split()[1] in (b"400", b"404"), status_line
    writer.transport.abort()
    api = Api.over(server)
    async with api.session:
        assert (await api.get("/health"))[0] == 200


def resident_bytes(server: RunningServer) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


async def test_a_body_that_unpacks_to_very_much(server: RunningServer) -> None:
    bomb = gzip.compress(b" " * 100_000_000)
    # The control: unpacked it would take a hundred megabytes.
    assert len(bomb) < 200_000
    before = resident_bytes(server)
    api = Api.over(server)
    async with api.session, api.session.post("/execute", data=bomb, headers={"Content-Encoding": "gzip"}) as response:
        assert (response.status, json.loads(await response.read())["kind"]) == (400, "bad_request")
    assert resident_bytes(server) - before < 20_000_000


async def test_requests_that_never_end(server: RunningServer) -> None:
    """Half of a head, half of a body, a byte at a time, and nobody who reads the answers."""
    beginnings = [
        b"",
        b"G",
        b"GET /health HTTP/1.1\r\nHo",
        raw(POST, HOST, b"Content-Length: 1000", body=b"{"),
        raw(POST, HOST, CHUNKED),
    ]
    unread = raw(b"GET /openapi.json HTTP/1.1", HOST) * 200
    api = Api.over(server)
    async with api.session:
        alone = await slowest(lambda: api.output("echo fine"), count=15)
        connections = [await asyncio.open_unix_connection(server.socket) for _ in range(200)]
        try:
            for index, (_, writer) in enumerate(connections):
                writer.write((*beginnings, unread)[index % 6])

            async def go_on() -> None:
                for index, (_, writer) in enumerate(connections):
                    if index % 6 == 2:
                        writer.write(b"a")
                assert await api.output("echo fine") == "fine\n"

            # At first 33 of them ask 200 times each for the document, and read nothing.
            assert await slowest(go_on, count=15) < 20 * alone + 2
        finally:
            for _, writer in connections:
                writer.transport.abort()
        assert (await api.get("/health"))[1]["busy"] == 0
