"""Requests that nobody in his right mind sends, by the thousand, made from the API's own document.

    python -m tests.security.fuzzing [--requests N] [--seed N]

starts a server, sends it N requests (10,000 unless told otherwise), and says what was answered. Hypothesis makes the requests
and, when one is answered in a way that it must not be, the smallest one that is.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from sandbox_image import openapi
from sandbox_image.protocol import ErrorKind
from sandbox_image.slots import TOOLS
from tests.sandbox_image.running import RunningServer, running
from tests.support.waiting import PATIENCE_S

SLOTS = 4
ANSWER_WITHIN_S = PATIENCE_S
_DOCUMENT = openapi.document(TOOLS)
_SCHEMAS = _DOCUMENT["components"]["schemas"]

TEXTS = [
    "", "\0", "\n", " ", ".", "..", "/", "../..", "../../../../../../etc/passwd", "/etc/passwd", "/workspace",
    "/workspace/../etc", "/proc/self/environ", "a\nb", "a\0b", "\ud800", "\udcff\udc00", "\U0010ffff", "a" * 256,
    "a" * 100_000, "d/" * 3_000, "-rf", "~", "$(id)", "`id`", ";", "&", "'", '"', "\\", "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    "%2e%2e%2f", "slot_0\n", "slot_-1", "slot_00",
    "slot_99999999999999999999", "file", "file/below", "link", "fifo", "closed", "null", "{}", "[" * 5_000,
]  # fmt: skip
NUMBERS = [
    0, -1, 1, True, 2**31, 2**53 + 1, 2**63, 2**64, -(2**64), 10**400, 1e308, -1e308, 5e-324, 1e-9, -0.0, 0.5,
    float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
COMMANDS = [
    "true", "false", "echo x", "exit 300", "cat missing", "cat", "printf '\\377\\n'", "sleep 0.02", "kill -9 $$", "cd /; pwd",
    "echo x > file; ln -sf / link; mkfifo fifo; mkdir -m 0 closed", "head -c 200000 /dev/zero", "exec", "exit", "(",
]  # fmt: skip
PATHS = [
    "/", "//execute", "/execute/", "/EXECUTE", "/execute?x=1", "/../../etc/passwd", "/%2e%2e/etc", "/execute%00", "*",
    "/" + "a" * 4000, "/artifacts", "/slots/slot_0", "http://other/execute",
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND", "X"]
KNOWN: dict[str, SearchStrategy[Any]] = {
    "slot_id": st.sampled_from([f"slot_{index}" for index in range(SLOTS)]),
    "command": st.sampled_from(COMMANDS),
    "path": st.sampled_from(["file", "a/b/c", ".", "link", "fifo", "closed", "/workspace/file"]),
    "layer": st.none(),
    "name": st.sampled_from(["one", "two", "x" * 128]),
    "lease": st.none(),
    "network": st.just(False),
    # Whoever asks for a long time to wait gets it.
    "timeout": st.sampled_from([None, 0.05, 1, 86_400]),
    "min_wait_s": st.sampled_from([0, 0.05]),
    "max_wait_s": st.sampled_from([0.05, 0.2]),
}
"""Values of fields with which a request comes further than to the door."""


def hostile() -> SearchStrategy[Any]:
    """Any JSON value, above all those that somebody forgot."""
    plain = st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.none(), st.booleans(), st.text(max_size=20))
    nested = st.integers(1, 900).map(lambda depth: json.loads("[" * depth + "]" * depth))
    return st.one_of(
        plain, nested, st.lists(plain, max_size=3), st.dictionaries(st.sampled_from(TEXTS) | st.text(), plain, max_size=3)
    )


def of_schema(schema: dict[str, Any]) -> SearchStrategy[Any]:
    """Values that conform to a schema of the document."""
    if "$ref" in schema:
        return st.deferred(lambda: of_message(schema["$ref"].rsplit("/", 1)[1]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([of_schema(option) for option in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "integer":
        return st.integers(schema.get("minimum", -(2**63)), schema.get("maximum", 2**63))
    if kind == "array":
        return st.lists(of_schema(schema["items"]), max_size=5)
    if kind == "object":
        return st.dictionaries(st.text(max_size=5), of_schema(schema.get("additionalProperties") or {}), max_size=3)
    simple: dict[str | None, SearchStrategy[Any]] = {
        "string": st.text(max_size=30),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return simple.get(kind, st.none())


@st.composite
def of_message(draw: st.DrawFn, name: str, tool: str | None = None) -> Any:
    """A message as the document has it, or nearly so."""
    schema = _SCHEMAS[name]
    value: dict[str, Any] = {}
    if name == "ExecuteRequest":
        tool = draw(st.sampled_from(sorted(TOOLS)))
        value = {"tool": tool, "args": draw(of_message(TOOLS[tool].__name__))}
    for field_name, expected in schema["properties"].items():
        if field_name in value:
            continue
        if field_name in schema["required"] or draw(st.booleans()):
            value[field_name] = draw(KNOWN[field_name] if field_name in KNOWN else of_schema(expected))
    change = draw(st.sampled_from(["none"] * 5 + ["replace", "drop", "add"]))
    if change == "replace" and value:
        value[draw(st.sampled_from(sorted(value)))] = draw(hostile())
    elif change == "drop" and value:
        del value[draw(st.sampled_from(sorted(value)))]
    elif change == "add":
        value[draw(st.sampled_from(TEXTS) | st.text(max_size=10))] = draw(hostile())
    return value


@dataclass(frozen=True)
class Request:
    """What goes over the wire."""

    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    chunked: bool = False

    def bytes(self) -> bytes:
        """The request as it is sent."""
        headers = {"Host": "localhost", "Content-Type": "application/json", **dict(self.headers)}
        body = self.body
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
            chunks = [body[at : at + 100] for at in range(0, len(body), 100)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        else:
            headers["Content-Length"] = str(len(body))
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1") + body


def _encode(value: object) -> bytes:
    return json.dumps(value).encode()


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """One request: a route's own method and message for the most part."""
    route = draw(st.sampled_from(openapi.ROUTES))
    method, path, body = route.method, route.path, b""
    if isinstance(route.request, dict):
        items = draw(st.lists(of_message("ExecuteRequest") | hostile(), max_size=6) | hostile())
        body = _encode(items)
    elif route.request is not None:
        body = _encode(draw(of_message(route.request.__name__) if draw(st.integers(0, 9)) else hostile()))
    change = draw(st.sampled_from(["none"] * 6 + ["method", "path", "body", "headers"]))
    if change == "method":
        method = draw(st.sampled_from(METHODS))
    elif change == "path":
        path = draw(st.sampled_from(PATHS))
    elif change == "body":
        cut = draw(st.integers(0, len(body)))
        body = draw(
            st.sampled_from([body[:cut], body[cut:], b"\xff" + body, body + b"x", body.replace(b"{", b"[", 1), b"\0" * 10])
        )
    headers = draw(st.sampled_from(HEADERS)) if change == "headers" else ()
    return Request(method, path, body, headers, chunked=draw(st.integers(0, 9)) == 0)


HEADERS: list[tuple[tuple[str, str], ...]] = [
    (("Content-Type", "text/plain"),),
    (("Content-Type", "application/x-www-form-urlencoded"),),
    (("Content-Type", "multipart/form-data; boundary=x"),),
    (("Content-Type", "application/json; charset=utf-16"),),
    (("Content-Type", ""),),
    (("Content-Type", "x" * 4000),),
    (("Content-Encoding", "gzip"),),
    (("Content-Encoding", "deflate"),),
    (("Content-Encoding", "nonsense"),),
    (("Accept", "application/x-ndjson"),),
    (("Accept", "text/html"),),
    (("Accept", "\xff\xfe"),),
    (("Authorization", "Bearer x"),),
    (("Origin", "https://example.org"),),
    (("Host", ""),),
    (("Host", "a b"),),
    (("Expect", "100-continue"),),
    (("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "x")),
    (("Connection", "close"),),
    (("Cookie", "=" * 1000),),
    (("Range", "bytes=0-"),),
    (("X-HTTP-Method-Override", "DELETE"),),
    tuple((f"X-{number}", "y") for number in range(90)),
]


@dataclass
class Fuzzer:
    """Sends requests to a server and holds its answers against what was promised."""

    server: RunningServer
    answers: collections.Counter[int] = field(default_factory=collections.Counter)
    slowest_s: float = 0.0
    _connection: socket.socket | None = None

    def send(self, request: Request) -> tuple[int, bytes]:
        """The status and the body of the answer.

        Raises:
            OSError, http.client.HTTPException: there was none.
        """
        start = time.monotonic()
        if self._connection is not None:
            try:
                answer = self._send(self._connection, request)
            except (http.client.RemoteDisconnected, ConnectionError):
                # It was closed after the answer before, which a client that uses it again has to expect.
                self.close()
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.settimeout(ANSWER_WITHIN_S)
            self._connection.connect(self.server.socket)
            answer = self._send(self._connection, request)
        self.slowest_s = max(self.slowest_s, time.monotonic() - start)
        response, body = answer
        if response.will_close:
            self.close()
        return response.status, body

    @staticmethod
    def _send(connection: socket.socket, request: Request) -> tuple[http.client.HTTPResponse, bytes]:
        with contextlib.suppress(BrokenPipeError):
            # Who answers early need not read the rest.
            connection.sendall(request.bytes())
        with http.client.HTTPResponse(connection, method=request.method) as response:
            response.begin()
            return response, response.read()

    def check(self, request: Request) -> None:
        """Send a request; it must be answered in time, and if it is not served, with the reason."""
        status, body = self.send(request)
        self.answers[status] += 1
        assert status < 500, (request, status, body)
        assert status in {200, *(kind.status for kind in ErrorKind)}, (request, status, body)
        if request.method == "HEAD":
            return
        if status == 200:
            error = json.loads(body).get("error") if body[:1] == b"{" else None
            assert error is None or "\n" not in error, body
            return
        # What is not even HTTP is answered by the library below, in plain text.
        if body[:1] == b"{":
            failure = json.loads(body)
            assert failure["kind"] in set(ErrorKind), failure
            assert failure["error"], failure
            assert "\n" not in failure["error"], failure
        else:
            assert status == 400, (request, status, body)

    def run(self, count: int, *, seed_value: int | None) -> None:
        """Send that many requests.

        Raises:
            AssertionError: an answer that must not be.
        """

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=seed_value is None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(request=requests())
        def every(request: Request) -> None:
            self.check(request)

        (every if seed_value is None else seed(seed_value)(every))()

    def still_serves(self) -> None:
        """Every slot runs a command, in a shell of each kind, and files can be written and read."""
        for index in range(SLOTS):
            slot = {"slot_id": f"slot_{index}"}
            self._expect("/reset", slot, "state", "ready")
            for tool in ("bash", "bash_stateful"):
                call = {**slot, "tool": tool, "args": {"command": "echo fine"}}
                self._expect("/execute", call, "output", "fine\n")
            self._expect("/execute", {**slot, "tool": "write_file", "args": {"path": "a", "content": "b"}}, "success", True)
            self._expect("/artifacts/read", {**slot, "path": "a"}, "content", "b")
        status, body = self.send(Request("GET", "/health", b""))
        health = json.loads(body)
        assert (status, health["status"], health["busy"]) == (200, "ok", 0), health

    def _expect(self, path: str, payload: object, name: str, value: object) -> None:
        status, body = self.send(Request("POST", path, _encode(payload)))
        assert (status, json.loads(body).get(name)) == (200, value), (path, payload, status, body)

    def close(self) -> None:
        """Give up the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def main() -> int:
    """Send many requests to a server of its own."""
    parser = argparse.ArgumentParser(description="Send a slot server requests that nobody in his right mind sends.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="the same requests again")
    options = parser.parse_args()
    seed_value = time.time_ns() % 10**9 if options.seed is None else options.seed
    with running(slots=SLOTS) as server:
        fuzzer = Fuzzer(server)
        start = time.monotonic()
        try:
            fuzzer.run(options.requests, seed_value=seed_value)
            fuzzer.still_serves()
        finally:
            fuzzer.close()
            answers = ", ".join(f"{count} x {status}" for status, count in sorted(fuzzer.answers.items()))
            sys.stdout.write(
                f"seed {seed_value}: {sum(fuzzer.answers.values())} requests in {time.monotonic() - start:.0f} s: {answers}; "
                f"the slowest took {fuzzer.slowest_s:.1f} s\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
