"""The client of a slot server: one method per route; an answer becomes a message of the protocol or a typed exception.

Nothing that the server says is trusted: answers are read up to a bound and decoded by `backends.codec`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

from backends.codec import (
    EncodedCall,
    Outcome,
    decode,
    encode,
    exception_of,
    read_line,
    read_list,
    read_message,
    read_result,
)
from backends.errors import ExecutionTimeoutError, SandboxProtocolError, SandboxUnavailableError
from backends.http import ConnectionLostError, HttpAnswer, HttpClient, NotDeliveredError
from sandbox_image.protocol import (
    MAX_FILE_BYTES,
    ArtifactArchive,
    ArtifactArchiveRequest,
    ArtifactContent,
    ArtifactListing,
    ArtifactListRequest,
    ArtifactReadRequest,
    DeleteLayerRequest,
    ExecutionResult,
    FreezeRequest,
    Health,
    ResetRequest,
    SlotState,
    Wire,
)

TIMEOUT_MARGIN_S = 15.0
CONTROL_TIMEOUT_S = 120.0
FREEZE_TIMEOUT_S = 600.0
CONNECT_RETRIES_S = (0.05, 0.2, 0.5)
"""Pauses before the retries of a request for which there was no connection."""

_JSON_ESCAPE = 6  # one byte can become \u0000
_MESSAGE_BYTES = 1 << 20
_RESULT_BYTES = _JSON_ESCAPE * MAX_FILE_BYTES + _MESSAGE_BYTES
_ENTRY_BYTES = _JSON_ESCAPE * 4096 + 200
_LISTING_BYTES = 256 << 20

_PIECEWISE_ABOVE_BYTES = 1 << 18
Answer = TypeVar("Answer")


async def _lines(answer: HttpAnswer, count: int) -> AsyncIterator[bytes]:
    """The lines of a streamed answer: at most `count`, each at most `_RESULT_BYTES` long."""
    buffer = bytearray()
    async for piece in answer.pieces():
        searched = len(buffer)
        buffer += piece
        while (end := buffer.find(b"\n", searched)) >= 0:
            if count == 0:
                raise SandboxProtocolError("the server's answer has more lines than the batch has calls")
            count -= 1
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            searched = 0
            yield line
        if len(buffer) > _RESULT_BYTES:
            raise SandboxProtocolError(f"the server's answer has a line longer than {_RESULT_BYTES} bytes")


async def _persist(attempt: Callable[[], Awaitable[Answer]], *, repeatable: bool) -> Answer:
    """Retry an attempt that got no connection, and once a `repeatable` one whose connection broke."""
    pauses = iter(CONNECT_RETRIES_S)
    while True:
        try:
            return await attempt()
        except NotDeliveredError:
            pause = next(pauses, None)
            if pause is None:
                raise
            await asyncio.sleep(pause)
        except ConnectionLostError:
            if not repeatable:
                raise
            repeatable = False


def _names(answer: object) -> list[str]:
    names = read_list(answer, "layers")
    if not all(isinstance(name, str) for name in names):
        raise SandboxProtocolError("the server's answer names a layer by something that is not a string")
    return names


class SlotServerClient:
    """Talks to one slot server over TCP (HTTP or HTTPS) with a bearer token, or over a unix socket; connections are reused.

    Owned by `async with`, or closed by `close()`: requests under way then end in `SandboxUnavailableError`.

    Every method raises `SandboxUnavailableError` (no answer), `SlotLostError`, `SandboxProtocolError` (an answer that is not
    the protocol, or the server calls the request malformed) and what it names itself; nothing else.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        token: str | None = None,
        unix_socket: Path | None = None,
        ca_file: Path | None = None,
        timeout_margin_s: float = TIMEOUT_MARGIN_S,
    ) -> None:
        """`url` like `http://host:port` or `https://host`, or `unix_socket`; exactly one of them.

        A server with https has to have a certificate that the system trusts, or the ones in `ca_file` (PEM).
        `timeout_margin_s` is what the server gets on top of a tool's own timeout before a call counts as unanswered.
        """
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = HttpClient(url=url, unix_socket=unix_socket, headers=headers, ca_file=ca_file)
        self._margin_s = timeout_margin_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop all connections."""
        await self._http.close()

    async def execute(self, call: EncodedCall) -> ExecutionResult:
        """Run one tool. A call with an `execution_id` is asked for again, once, if the connection breaks.

        Raises:
            ExecutionTimeoutError: no answer within the tool's timeout plus the margin.
        """
        try:
            async with asyncio.timeout(self._patience_s(call)):
                answer = await self._request(
                    "POST", "/execute", call.body, limit=_RESULT_BYTES, repeatable=call.execution_id is not None
                )
        except TimeoutError:
            raise self._unanswered(call) from None
        return read_result(call, answer)

    async def execute_many(self, calls: Sequence[EncodedCall], deliver: Callable[[int, Outcome], None]) -> None:
        """Run calls of different slots in one request; `deliver(index, outcome)` is called as soon as an outcome is known.

        It is sent once: an outcome that is not delivered can be asked for by `execute`, if the call has an `execution_id`.

        Raises:
            SandboxError: why the calls that were not delivered have no outcome.
        """
        loop = asyncio.get_running_loop()
        start, pending = loop.time(), dict(enumerate(calls))

        def settle(index: int, outcome: Outcome) -> None:
            if pending.pop(index, None) is not None:
                deliver(index, outcome)

        timers = [
            loop.call_at(start + self._patience_s(call), settle, index, self._unanswered(call))
            for index, call in enumerate(calls)
        ]
        try:
            async with asyncio.timeout_at(start + max(map(self._patience_s, calls))):
                await self._stream_batch(calls, settle)
        except TimeoutError:
            for index, call in list(pending.items()):
                settle(index, self._unanswered(call))
        finally:
            for timer in timers:
                timer.cancel()
        if pending:
            raise ConnectionLostError("the slot server ended a batch before all of its results")

    async def reset(self, request: ResetRequest) -> SlotState:
        """Give a slot a new box and workspace. Repeated if the connection breaks: a second reset does no harm."""
        return read_message(SlotState, await self._control("/reset", request, repeatable=True))

    async def freeze(self, request: FreezeRequest) -> SlotState:
        """Keep a slot's workspace as a layer; the slot is empty afterwards."""
        return read_message(SlotState, await self._control("/layers", request, timeout_s=FREEZE_TIMEOUT_S))

    async def layers(self) -> list[str]:
        """Names of the frozen layers."""
        return _names(await self._control("/layers", repeatable=True))

    async def delete_layer(self, request: DeleteLayerRequest) -> list[str]:
        """Delete a layer; names of the others.

        Raises:
            MissingError: there is no such layer.
        """
        return _names(await self._control("/layers/delete", request))

    async def health(self) -> Health:
        """What the server is and which defences hold."""
        return read_message(Health, await self._control("/health", repeatable=True))

    async def slots(self) -> list[SlotState]:
        """All slots of the server."""
        return [read_message(SlotState, slot) for slot in read_list(await self._control("/slots", repeatable=True), "slots")]

    async def read_artifact(self, request: ArtifactReadRequest) -> ArtifactContent:
        """Read one file whole, or not at all.

        Raises:
            ArtifactNotFoundError, ArtifactForbiddenError, ArtifactTooLargeError: the path's fault.
        """
        limit = _JSON_ESCAPE * request.max_bytes + _MESSAGE_BYTES
        answer = await self._control("/artifacts/read", request, limit=limit, repeatable=True, artifact=True)
        return read_message(ArtifactContent, answer)

    async def list_artifacts(self, request: ArtifactListRequest) -> ArtifactListing:
        """List a directory. Raises as `read_artifact`."""
        limit = min(_ENTRY_BYTES * request.max_entries + _MESSAGE_BYTES, _LISTING_BYTES)
        answer = await self._control("/artifacts/list", request, limit=limit, repeatable=True, artifact=True)
        return read_message(ArtifactListing, answer)

    async def archive_artifacts(self, request: ArtifactArchiveRequest) -> ArtifactArchive:
        """Pack a directory. Raises as `read_artifact`."""
        limit = 2 * request.max_bytes + _MESSAGE_BYTES
        answer = await self._control("/artifacts/archive", request, limit=limit, repeatable=True, artifact=True)
        return read_message(ArtifactArchive, answer)

    def _patience_s(self, call: EncodedCall) -> float:
        return call.timeout_s + self._margin_s

    def _unanswered(self, call: EncodedCall) -> ExecutionTimeoutError:
        return ExecutionTimeoutError(f"no answer within the tool's timeout of {call.timeout_s:g} s plus {self._margin_s:g} s")

    async def _control(
        self,
        route: str,
        message: Wire | None = None,
        *,
        limit: int = _MESSAGE_BYTES,
        timeout_s: float = CONTROL_TIMEOUT_S,
        repeatable: bool = False,
        artifact: bool = False,
    ) -> object:
        """A request to any route but those that run tools: POST with a message, GET without."""
        method, body = ("GET", b"") if message is None else ("POST", encode(message))
        try:
            async with asyncio.timeout(timeout_s):
                return await self._request(method, route, body, limit=limit, repeatable=repeatable, artifact=artifact)
        except TimeoutError:
            raise SandboxUnavailableError(f"the slot server did not answer {method} {route} within {timeout_s:g} s") from None

    async def _request(
        self, method: str, route: str, body: bytes, *, limit: int, repeatable: bool, artifact: bool = False
    ) -> object:
        """One request and its JSON answer, repeated as far as that is safe."""

        async def attempt() -> object:
            async with self._http.request(method, route, body) as answer:
                payload = await answer.body(limit if answer.status == 200 else _MESSAGE_BYTES)
            if answer.status != 200:
                raise exception_of(decode(payload), artifact=artifact)
            return decode(payload)

        return await _persist(attempt, repeatable=repeatable)

    async def _stream_batch(self, calls: Sequence[EncodedCall], settle: Callable[[int, Outcome], None]) -> None:
        body = b"[" + b",".join(call.body for call in calls) + b"]"
        async with self._http.request("POST", "/batch", body, accept="application/x-ndjson") as answer:
            if answer.status != 200:
                raise exception_of(decode(await answer.body(_MESSAGE_BYTES)), artifact=False)
            async for line in _lines(answer, len(calls)):
                settle(*read_line(line, calls))
