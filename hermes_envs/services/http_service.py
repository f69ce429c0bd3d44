"""JSON over HTTP: authorization, validation of requests, and the status of those that fail.

A request that cannot be served is answered with a status that says whose fault it is and `{"kind", "error"}`, as a slot server
does. A tool that fails is not such a request: it is a result.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

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
from sandbox_image.protocol import ExecutionResult

_STOPPING_S = 1.0
"""How long requests under way may take to end; aiohttp waits for it twice."""
_FAILURES: tuple[tuple[type[Exception], int, str], ...] = (
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

_SHOWN_PROBLEMS = 5


class Body(BaseModel):
    """What a request must look like: a JSON object with these fields, of exactly these types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnyBody = TypeVar("AnyBody", bound=Body)


class RefusalError(Exception):
    """A request that is not served; `status` is of HTTP."""

    def __init__(self, reason: str, status: int = 400, kind: str = "bad_request") -> None:
        super().__init__(reason)
        self.status = status
        self.kind = kind


def get(path: str, answer: Callable[[], Awaitable[Any]]) -> web.RouteDef:
    """A route that is asked without a body; what `answer` returns is sent as JSON."""

    async def handle(_: web.Request) -> web.Response:
        return _json(await answer())

    return web.get(path, handle, allow_head=False)


def post(path: str, kind: type[AnyBody], answer: Callable[[AnyBody], Awaitable[Any]]) -> web.RouteDef:
    """A route that gets a body of some kind; what `answer` returns is sent as JSON."""

    async def handle(request: web.Request) -> web.Response:
        return _json(await answer(await _read(request, kind)))

    return web.post(path, handle)


class HttpService:
    """Serves routes to whoever has the token. While `closing` is set, every request is refused."""

    def __init__(self, routes: Iterable[web.RouteDef], options: ServiceOptions) -> None:
        self._options = options
        token = options.token
        self._authorization = None if token is None else f"Bearer {token.get_secret_value()}".encode()
        self._application = web.Application(middlewares=[self._answer], client_max_size=options.max_request_bytes)
        self._application.add_routes(routes)
        self.closing = False

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve for the length of the block, which gets the port; then give requests under way a moment to end.

        Raises:
            ConfigError: the address cannot be had.
        """
        options = self._options
        runner = web.AppRunner(self._application, access_log=None, shutdown_timeout=_STOPPING_S)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, options.host, options.port).start()
            except OSError as reason:
                raise ConfigError(f"cannot listen at {options.host}, port {options.port}: {reason.strerror}") from reason
            yield int(runner.addresses[0][1])
        finally:
            await runner.cleanup()

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._admit(request)
            return await handler(request)
        except RefusalError as refusal:
            return _refuse(refusal.status, refusal.kind, refusal)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            return _refuse(404, "not_found", f"no route {request.method} {request.path}")
        except tuple(kind for kind, _, _ in _FAILURES) as reason:
            return next(_refuse(status, kind, reason) for type_, status, kind in _FAILURES if isinstance(reason, type_))

    def _admit(self, request: web.Request) -> None:
        if "Origin" in request.headers:
            # A page in a browser on this machine may send requests to any port of it.
            raise RefusalError("the header 'Origin' says that a web page asks; none may")
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._authorization is not None and not hmac.compare_digest(given, self._authorization):
            raise RefusalError("the header 'Authorization: Bearer TOKEN' is missing or wrong", 401, "unauthorized")
        if self.closing:
            raise RefusalError("the server is about to end", 503, "shutting_down")


async def _read(request: web.Request, kind: type[AnyBody]) -> AnyBody:
    try:
        payload = json.loads((await request.read()).decode(), parse_constant=_refuse_constant)
    except web.HTTPRequestEntityTooLarge as reason:
        raise RefusalError(f"the request has more than {request.client_max_size} bytes", 413, "too_large") from reason
    except (ValueError, RecursionError) as reason:
        raise RefusalError(f"the request is not JSON: {reason}") from reason
    if not isinstance(payload, dict):
        raise RefusalError(f"expected a JSON object, got {type(payload).__name__}")
    try:
        return kind.model_validate(payload)
    except ValidationError as reason:
        raise RefusalError("; ".join(map(_problem, reason.errors()[:_SHOWN_PROBLEMS]))) from reason


def _problem(error: ErrorDetails) -> str:
    return f"field {'.'.join(map(str, error['loc']))!r}: {error['msg'].removeprefix('Value error, ')}"


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def announce(port: int) -> None:
    """Write to standard output that requests are served."""
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


def _refuse(status: int, kind: str, reason: object) -> web.Response:
    return _json({"kind": kind, "error": str(reason)}, status)


def _json(payload: object, status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(payload).encode(), status=status, content_type="application/json")
