"""The HTTP server of the slots: routes, authorization, and the form of requests."""

from __future__ import annotations

import asyncio
import codecs
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from sandbox_image import openapi, pieces
from sandbox_image.box.blueprint import Blueprint
from sandbox_image.box.defences import DISK
from sandbox_image.errors import RequestError
from sandbox_image.execution_log import ExecutionLog
from sandbox_image.protocol import (
    MAX_BATCH_ITEMS,
    MAX_REQUEST_BYTES,
    RECORDING_PATH,
    VERSION,
    ArtifactArchiveRequest,
    ArtifactListRequest,
    ArtifactReadRequest,
    BatchLine,
    DeleteLayerRequest,
    ErrorKind,
    ExecuteRequest,
    ExecutionResult,
    Failure,
    FreezeRequest,
    Health,
    ProtocolError,
    ResetRequest,
)
from sandbox_image.slots import TOOLS, HostedSlot, check_call
from sandbox_image.storage.storage import Storage
from sandbox_image.tools import artifacts

MAX_EXECUTION_ID_CHARACTERS = 1024
_JSON_HEADERS = {"Content-Type": "application/json"}
_NDJSON = "application/x-ndjson"

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class SlotServer:
    """Answers the requests of `sandbox_image.protocol` for a number of slots."""

    def __init__(
        self, slots: dict[str, HostedSlot], storage: Storage, blueprint: Blueprint, data_dir: Path, token: str | None
    ) -> None:
        self._slots = slots
        self._storage = storage
        self._blueprint = blueprint
        self._data_dir = data_dir
        self._authorization = None if token is None else f"Bearer {token}".encode()
        self._executions = ExecutionLog()
        self._start = time.monotonic()
        self._routes: dict[tuple[str, str], Handler] = {
            ("POST", "/execute"): self._execute,
            ("POST", "/batch"): self._batch,
            ("POST", "/reset"): self._reset,
            ("POST", "/layers"): self._freeze,
            ("POST", "/layers/delete"): self._delete_layer,
            ("GET", "/layers"): self._list_layers,
            ("GET", "/health"): self._health,
            ("GET", "/slots"): self._list_slots,
            ("GET", "/openapi.json"): self._describe,
            ("POST", "/artifacts/read"): self._read_artifact,
            ("POST", "/artifacts/list"): self._list_artifacts,
            ("POST", "/artifacts/archive"): self._archive_artifacts,
        }

    def listener(self) -> web.Server:
        """The server for aiohttp: the low-level one, as a dozen fixed routes need no router on every call."""
        loop = asyncio.get_running_loop()

        def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_REQUEST_BYTES)

        # A compressed body can be a decompression bomb.
        return web.Server(self._answer, request_factory=request, access_log=None, auto_decompress=False)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            self._authorize(request)
            handler = self._routes.get((request.method, request.path))
            if handler is None:
                raise RequestError(ErrorKind.NOT_FOUND, f"no route {request.method} {request.path}")
            return await handler(request)
        except RequestError as error:
            return _failed(error)
        except ProtocolError as error:
            return _failed(RequestError(ErrorKind.BAD_REQUEST, str(error)))

    def _authorize(self, request: web.BaseRequest) -> None:
        if "Origin" in request.headers:
            # A web page that is open in a browser on this machine can send requests to any port of it.
            raise RequestError(ErrorKind.BAD_REQUEST, "the header 'Origin' says that a web page asks; none may")
        if self._authorization is None:
            return
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._authorization):
            raise RequestError(ErrorKind.UNAUTHORIZED, "the header 'Authorization: Bearer TOKEN' is missing or wrong")

    def _slot(self, slot_id: str) -> HostedSlot:
        slot = self._slots.get(slot_id)
        if slot is None:
            raise RequestError(ErrorKind.NOT_FOUND, f"no slot {slot_id!r}; there are slot_0 to slot_{len(self._slots) - 1}")
        return slot

    async def _execute(self, request: web.BaseRequest) -> web.Response:
        result = await self._run(await _body(request))
        return _json(result.to_json())

    async def _run(self, payload: object) -> ExecutionResult:
        call = ExecuteRequest.from_json(payload)
        slot = self._slot(call.slot_id)
        arguments = check_call(call)
        if call.execution_id is None:
            return await slot.execute(call, arguments)
        if len(call.execution_id) > MAX_EXECUTION_ID_CHARACTERS:
            raise RequestError(ErrorKind.BAD_REQUEST, f"field 'execution_id' is longer than {MAX_EXECUTION_ID_CHARACTERS}")
        # In another workspace the same id is another execution.
        key = (call.slot_id, call.lease or slot.lease, call.execution_id)
        result = await self._executions.once(key, lambda: slot.execute(call, arguments))
        return ExecutionResult(result.success, result.output, result.error, call.execution_id, result.metadata)

    async def _batch(self, request: web.BaseRequest) -> web.StreamResponse:
        items = await _body(request)
        if not isinstance(items, list):
            raise RequestError(ErrorKind.BAD_REQUEST, f"expected a JSON list, got {type(items).__name__}")
        if len(items) > MAX_BATCH_ITEMS:
            raise RequestError(ErrorKind.TOO_LARGE, f"{len(items)} items, the limit is {MAX_BATCH_ITEMS}")
        lines: asyncio.Queue[BatchLine] = asyncio.Queue()
        if _NDJSON not in request.headers.get("Accept", ""):
            await self._run_items(items, lines)
            answers = sorted((lines.get_nowait() for _ in items), key=lambda line: line.index)
            return await _send_large(request, lambda: _encode_list(line.result or line.failure for line in answers))
        response = web.StreamResponse(headers={"Content-Type": _NDJSON})
        await response.prepare(request)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_items(items, lines))
            await _stream(response, lines, len(items))
        return response

    async def _run_items(self, items: list[Any], lines: asyncio.Queue[BatchLine]) -> None:
        """Run the items of one slot one after the other, those of different slots concurrently."""
        queues: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            slot_id = item.get("slot_id") if isinstance(item, dict) else None
            queues.setdefault(slot_id if isinstance(slot_id, str) else "", []).append(index)

        async def run_queue(indices: list[int]) -> None:
            for index in indices:
                lines.put_nowait(await self._run_item(index, items[index]))

        async with asyncio.TaskGroup() as group:
            for indices in queues.values():
                group.create_task(run_queue(indices))

    async def _run_item(self, index: int, item: object) -> BatchLine:
        try:
            result = await self._run(item)
        except (RequestError, ProtocolError) as error:
            kind = error.kind if isinstance(error, RequestError) else ErrorKind.BAD_REQUEST
            name = item.get("execution_id") if isinstance(item, dict) else None
            failure = Failure(kind.value, str(error), name if isinstance(name, str) else None)
            return BatchLine(index, failure=failure.to_json())
        return BatchLine(index, result=result.to_json())

    async def _reset(self, request: web.BaseRequest) -> web.Response:
        wanted = ResetRequest.from_json(await _body(request))
        slot = self._slot(wanted.slot_id)
        state = await slot.reset(
            wanted.layer, network=wanted.network, memory_bytes=wanted.memory_bytes, for_layer=wanted.for_layer
        )
        return _json(state.to_json())

    async def _freeze(self, request: web.BaseRequest) -> web.Response:
        wanted = FreezeRequest.from_json(await _body(request))
        slot = self._slot(wanted.slot_id)
        state = await (slot.snapshot if wanted.snapshot else slot.freeze)(wanted.name, wanted.lease)
        return _json(state.to_json())

    async def _delete_layer(self, request: web.BaseRequest) -> web.Response:
        self._storage.layers.delete(DeleteLayerRequest.from_json(await _body(request)).name)
        return await self._list_layers(request)

    async def _list_layers(self, request: web.BaseRequest) -> web.Response:
        return _json({"layers": self._storage.layers.names()})

    async def _health(self, request: web.BaseRequest) -> web.Response:
        # The defences of all boxes are the same.
        defences = next(iter(self._slots.values())).defences | {DISK: self._storage.defence()}
        health = Health(
            status="ok",
            version=VERSION,
            slots=len(self._slots),
            busy=sum(slot.busy for slot in self._slots.values()),
            isolation=self._blueprint.isolation,
            data_dir=str(self._data_dir),
            uptime_s=round(time.monotonic() - self._start, 3),
            limits=self._blueprint.limits() | self._storage.limits(),
            defences={name: vars(defence) for name, defence in defences.items()},
        )
        return _json(health.to_json())

    async def _list_slots(self, request: web.BaseRequest) -> web.Response:
        return _json({"slots": [slot.state().to_json() for slot in self._slots.values()]})

    async def _describe(self, request: web.BaseRequest) -> web.Response:
        return _json(openapi.document(TOOLS))

    async def _read_artifact(self, request: web.BaseRequest) -> web.StreamResponse:
        wanted = ArtifactReadRequest.from_json(await _body(request))
        slot = self._slot(wanted.slot_id)
        if wanted.path == RECORDING_PATH:
            content = await slot.recording(wanted)
        else:
            content = await slot.artifact(wanted, artifacts.read)
        return await _send_large(request, lambda: pieces.encode_json(content.to_json()))

    async def _list_artifacts(self, request: web.BaseRequest) -> web.StreamResponse:
        wanted = ArtifactListRequest.from_json(await _body(request))
        listing = await self._slot(wanted.slot_id).artifact(wanted, artifacts.listing)
        return await _send_large(request, lambda: pieces.encode_json(listing.to_json()))

    async def _archive_artifacts(self, request: web.BaseRequest) -> web.StreamResponse:
        wanted = ArtifactArchiveRequest.from_json(await _body(request))
        archive = await self._slot(wanted.slot_id).artifact(wanted, artifacts.archive)
        return await _send_large(request, lambda: pieces.encode_json(archive.to_json()))


async def _body(request: web.BaseRequest) -> Any:
    """The request's JSON, decoded while it arrives."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    texts, size = [], 0
    try:
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > MAX_REQUEST_BYTES:
                raise RequestError(ErrorKind.TOO_LARGE, f"the request has more than {MAX_REQUEST_BYTES} bytes")
            texts.append(decoder.decode(chunk))
        texts.append(decoder.decode(b"", final=True))
        return json.loads("".join(texts))
    except (ValueError, RecursionError) as error:
        raise RequestError(ErrorKind.BAD_REQUEST, f"the request is not JSON: {error}") from error


async def _stream(response: web.StreamResponse, lines: asyncio.Queue[BatchLine], count: int) -> None:
    for _ in range(count):
        line = await lines.get()
        try:
            await response.write(json.dumps(line.to_json()).encode() + b"\n")
        except ConnectionError:
            # The client is gone. Its calls run to their end, so that it can retry them by their execution ids.
            return
    await response.write_eof()


def _json(payload: object, status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(payload).encode(), status=status, headers=_JSON_HEADERS)


async def _send_large(request: web.BaseRequest, encode: Callable[[], list[bytes]]) -> web.StreamResponse:
    """Encode a possibly large answer in a thread, and write it as fast as the client reads."""
    encoded = await asyncio.to_thread(encode)
    response = web.StreamResponse(headers={**_JSON_HEADERS, "Content-Length": str(sum(map(len, encoded)))})
    await response.prepare(request)
    with suppress(ConnectionError):
        for piece in encoded:
            await response.write(piece)
        await response.write_eof()
    return response


def _encode_list(items: Iterable[object]) -> list[bytes]:
    encoded = [b"["]
    for number, item in enumerate(items):
        encoded += [b", " if number else b"", *pieces.encode_json(item)]
    return [*encoded, b"]"]


def _failed(error: RequestError) -> web.Response:
    return _json(Failure(error.kind.value, str(error)).to_json(), error.kind.status)
