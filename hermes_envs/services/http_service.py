"""JSON over HTTP: who may ask, what a request must look like, and how it is refused.

A request that cannot be served is answered with a status that says whose fault it is and `{"kind", "error"}`, as a slot server
does. A tool that fails is not such a request: it is a result.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from backends.codec import RefusedError
from backends.errors import (
    AcquireTimeoutError,
    ArtifactForbiddenError,
    ArtifactNotFoundError,
    ArtifactTooLargeError,
    ExecutionTimeoutError,
    SandboxError,
    SandboxUnavailableError,
    SlotLostError,
)
from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.services.options import ServiceOptions
from hermes_envs.services.trajectory_slots import UnknownTrajectoryError
from sandbox_image.protocol import ExecutionResult, ProtocolError, Wire

_STOPPING_S = 1.0
"""How long requests under way may go on; aiohttp waits for it twice."""
_JSON_HEADERS = {"Content-Type": "application/json"}
_FAILURES: tuple[tuple[type[Exception], int, str], ...] = (
    (ProtocolError, 400, "bad_request"),
    (RefusedError, 400, "bad_request"),
    (UnknownTrajectoryError, 404, "not_found"),
    (ArtifactForbiddenError, 403, "outside_workspace"),
    (ArtifactNotFoundError, 404, "not_found"),
    (ArtifactTooLargeError, 413, "too_large"),
    (SlotLostError, 409, "slot_lost"),
    (AcquireTimeoutError, 503, "no_slot"),
    (SandboxUnavailableError, 503, "sandbox_unavailable"),
    (ExecutionTimeoutError, 504, "sandbox_timeout"),
    (SandboxError, 502, "sandbox_failed"),
    (ToolServerError, 502, "tool_server_failed"),
)
"""The first that fits says how an exception is answered."""

Handler = Callable[[Any], Awaitable[dict[str, Any]]]
Route = tuple[type[Wire] | None, Handler]
"""What the body must be, if there has to be one, and who answers."""


class RefusalError(Exception):
    """A request that is not served; `status` is of HTTP."""

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.kind = kind


class HttpService:
    """Serves a few fixed routes; while it listens, `closing` refuses everything."""

    def __init__(self, routes: Mapping[tuple[str, str], Route], options: ServiceOptions) -> None:
        self._routes = routes
        self._options = options
        token = options.token
        self._authorization = None if token is None else f"Bearer {token.get_secret_value()}".encode()
        self.closing = False

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve for the length of the block, which gets the port; then give those who still wait a moment.

        Raises:
            ConfigError: the address cannot be had.
        """
        options, loop = self._options, asyncio.get_running_loop()

        def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=options.max_request_bytes)

        server = web.Server(self._answer, request_factory=request, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=_STOPPING_S)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, options.host, options.port).start()
            except OSError as reason:
                raise ConfigError(f"cannot listen at {options.host}, port {options.port}: {reason.strerror}") from reason
            yield int(runner.addresses[0][1])
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        try:
            return _json(await self._serve(request), 200)
        except RefusalError as refusal:
            return _refuse(refusal.status, refusal.kind, str(refusal))
        except tuple(kind for kind, _, _ in _FAILURES) as reason:
            status, kind = next((status, kind) for type_, status, kind in _FAILURES if isinstance(reason, type_))
            return _refuse(status, kind, str(reason))

    async def _serve(self, request: web.BaseRequest) -> dict[str, Any]:
        self._authorize(request)
        if self.closing:
            raise RefusalError(503, "shutting_down", "the server is about to end")
        if (request.method, request.path) not in self._routes:
            raise RefusalError(404, "not_found", f"no route {request.method} {request.path}")
        kind, handle = self._routes[request.method, request.path]
        if kind is None:
            return await handle(None)
        message = kind.from_json(await self._body(request))
        message.check()
        return await handle(message)

    def _authorize(self, request: web.BaseRequest) -> None:
        if "Origin" in request.headers:
            # A page that somebody on this machine looks at may send requests to any port of it.
            raise RefusalError(400, "bad_request", "the header 'Origin' says that a web page asks; none may")
        if self._authorization is None:
            return
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._authorization):
            raise RefusalError(401, "unauthorized", "the header 'Authorization: Bearer TOKEN' is missing or wrong")

    async def _body(self, request: web.BaseRequest) -> object:
        try:
            return json.loads((await request.read()).decode(), parse_constant=_refuse_constant)
        except web.HTTPRequestEntityTooLarge as reason:
            limit = self._options.max_request_bytes
            raise RefusalError(413, "too_large", f"the request has more than {limit} bytes") from reason
        except (ValueError, RecursionError) as reason:
            raise RefusalError(400, "bad_request", f"the request is not JSON: {reason}") from reason


def stop_signal() -> asyncio.Event:
    """What SIGTERM and SIGINT set from now on."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def announce(port: int) -> None:
    """Say on standard output that requests are served from now on."""
    sys.stdout.write(json.dumps({"ready": True, "port": port}) + "\n")
    sys.stdout.flush()


def result_json(result: ExecutionResult) -> dict[str, Any]:
    """What a tool did, as every service answers it."""
    return {"success": result.success, "output": result.output, "error": result.error, "metadata": result.metadata}


def unusable_json(reason: str) -> dict[str, Any]:
    """The answer to a call that a model got wrong: a result, for the model to read. What a program gets wrong is refused."""
    return result_json(ExecutionResult(success=False, output="", error=reason, metadata={"executed": False}))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _refuse(status: int, kind: str, reason: str) -> web.Response:
    return _json({"kind": kind, "error": reason}, status)


def _json(payload: object, status: int) -> web.Response:
    return web.Response(body=json.dumps(payload).encode(), status=status, headers=_JSON_HEADERS)
