"""One inference server, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

import aiohttp
import certifi

from hermes_envs.errors import ConfigError, EngineError, EngineRefusalError, EngineUnavailableError

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig

CONNECT_TIMEOUT_S = 30.0
HEALTH_TIMEOUT_S = 10.0
HEALTH_POLL_S = 1.0
LONGEST_RETRY_AFTER_S = 60.0

REPLY_LIMIT_BYTES = 64 * 2**20
"""No turn of a model is this long, its logprobs included; a longer reply would fill the memory before anybody looks at it."""

_PASSING = frozenset({408, 409, 429})
"""The refusals below 500 that pass by themselves."""


class Endpoint:
    """Sends JSON to one server over connections that are kept, and knows how busy the server is and whether it is up.

    `timeout` of the config is for one request, without the time that it waits for a place. With `health_check` a server that
    has failed counts as down until it answers `GET /health`; without, it counts as up whatever happens.
    """

    uses_proxies: ClassVar[bool] = False
    """Whether the proxies of the process's environment apply: engines of one's own are reached directly."""

    def __init__(self, config: APIServerConfig) -> None:
        """Raises: ConfigError: the config names no address."""
        if not config.base_url:
            raise ConfigError("openai.base_url: the policy needs the address of an inference endpoint")
        self.address = config.base_url
        self.model = config.model_name
        self.in_flight = 0
        self.is_up = True
        self.failed_at = -math.inf
        """When a request failed for which the server is to blame, by the monotonic clock, unless one has succeeded since."""
        self.request_seconds: deque[float] = deque(maxlen=config.rolling_buffer_length)
        self._config = config
        self._most_at_once: int = config.num_max_requests_at_once
        self.root = config.base_url.rstrip("/").removesuffix("/v1")
        self._open_session: aiohttp.ClientSession | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def has_room(self) -> bool:
        """Whether another request may be sent now."""
        return self.is_up and self.in_flight < self._most_at_once

    @property
    def load(self) -> float:
        """The share of its places that is taken."""
        return self.in_flight / self._most_at_once

    def limit_requests(self, weight: float) -> None:
        """Send at most this share of `num_max_requests_at_once` requests at once, at least one."""
        self._most_at_once = max(1, math.ceil(weight * self._config.num_max_requests_at_once))

    async def post(self, url: str, body: object) -> Any:
        """Send a request and read the reply's JSON.

        Raises:
            EngineUnavailableError: no connection, a broken one, or a status that passes: 429, 5xx and the like.
            EngineRefusalError: any other status from 400 on.
            EngineError: the server did not answer in time, or not with JSON.
        """
        started = time.monotonic()
        try:
            async with self._session().post(url, json=body) as response:
                content = await self._read(response)
                if response.status >= 400:
                    raise self.failure(response, content.decode(errors="replace"))
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as reason:
            self._note_failure()
            raise EngineUnavailableError(f"the endpoint {self.address} failed: {_described(reason)}") from reason
        except TimeoutError as reason:
            self._note_failure()
            raise EngineError(f"the endpoint {self.address} did not answer within {self._config.timeout} s") from reason
        except aiohttp.ClientError as reason:
            raise EngineError(f"the endpoint {self.address} failed: {_described(reason)}") from reason
        except EngineUnavailableError:
            self._note_failure()
            raise
        self.failed_at = -math.inf
        self.request_seconds.append(time.monotonic() - started)
        return self._parsed(content)

    def failure(self, response: aiohttp.ClientResponse, text: str) -> Exception:
        """What is raised for a reply whose status is 400 or more."""
        what = f"the endpoint {self.address} refused: {response.status} {response.reason}: {one_line(text)}"
        if response.status < 500 and response.status not in _PASSING:
            return EngineRefusalError(what)
        return EngineUnavailableError(what, _retry_after_s(response.headers.get("Retry-After", "")))

    def parse(self, text: str) -> Any:
        """The JSON of a reply. Raises: ValueError, RecursionError: it is none."""
        return json.loads(text)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        if self._open_session is not None:
            await self._open_session.close()

    def _session(self) -> aiohttp.ClientSession:
        # Made at the first request, for it belongs to an event loop.
        if self._open_session is None:
            self._open_session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._config.api_key}"} if self._config.api_key else {},
                timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=CONNECT_TIMEOUT_S),
                # How many there are is for `has_room` to say.
                connector=aiohttp.TCPConnector(limit=0, ssl=_ssl_context() if self.root.startswith("https:") else True),
                trust_env=self.uses_proxies,
            )
        return self._open_session

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for piece in response.content.iter_any():
            content += piece
            if len(content) > REPLY_LIMIT_BYTES:
                raise EngineError(f"the endpoint {self.address} sent more than {REPLY_LIMIT_BYTES} bytes")
        return bytes(content)

    def _parsed(self, content: bytes) -> Any:
        if not content.strip():
            raise EngineError(f"the endpoint {self.address} sent an empty reply")
        # A model may well produce broken UTF-8: what can be read of its answer is kept.
        text = content.decode(errors="replace")
        try:
            return self.parse(text)
        # A RecursionError is what thousands of nested brackets give.
        except (ValueError, RecursionError) as reason:
            raise EngineError(f"the endpoint {self.address} did not answer with JSON: {one_line(text)!r}") from reason

    def _note_failure(self) -> None:
        self.failed_at = time.monotonic()
        if self._config.health_check and self.is_up:
            self.is_up = False
            self._watch = asyncio.create_task(self._await_health(), name=f"health of {self.address}")

    async def _await_health(self) -> None:
        while True:
            if await self._is_healthy():
                self.is_up = True
                return
            await asyncio.sleep(HEALTH_POLL_S)

    async def _is_healthy(self) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._session().get(f"{self.root}/health", timeout=timeout) as response:
                # A server without such a route is up all the same.
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False


def one_line(text: str, limit: int = 300) -> str:
    """The beginning of a text, for a message."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[:limit] + "..."


def _described(reason: Exception) -> str:
    return f"{type(reason).__name__}: {one_line(str(reason))}"


def _retry_after_s(header: str) -> float | None:
    try:
        seconds = float(header)
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_RETRY_AFTER_S else None


def _ssl_context() -> ssl.SSLContext:
    """Certificates of the system and those of certifi: a bare container has none of its own."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
