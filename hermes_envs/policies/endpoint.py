"""One inference server, asked over HTTP."""

from __future__ import annotations

import json
import math
import ssl
import time
import urllib.parse
import urllib.request
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

import aiohttp
import certifi

from hermes_envs.errors import ConfigError, EngineError, EngineRefusalError, EngineUnavailableError

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig

CONNECT_TIMEOUT_S = 30.0
LONGEST_RETRY_AFTER_S = 60.0

REPLY_LIMIT_BYTES = 64 * 2**20
"""No turn of a model is this long, its logprobs included; a longer reply would fill the memory before anybody looks at it."""

_PASSING = frozenset({408, 409, 429})
"""The refusals below 500 that pass by themselves."""

_AWAY = frozenset({502, 503, 504})
"""What is answered in the place of a server that is not there, or not ready."""


class Endpoint:
    """Sends JSON to one server over connections that are kept, and knows how busy the server is and when it has failed.

    `timeout` of the config is for one request, without the time that it waits for a place.
    """

    uses_proxies: ClassVar[bool] = False
    """Whether the proxies of the process's environment apply: engines of one's own are reached directly."""

    def __init__(self, config: APIServerConfig) -> None:
        """Raises: ConfigError: the config names no address."""
        self.config = config
        self.address = str(config.base_url or "")
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"openai.base_url: {self.address!r} is not the http or https address of an inference endpoint")
        self.root = self.address.rstrip("/").removesuffix("/v1")
        self.most_at_once: int = config.num_max_requests_at_once
        self.in_flight = 0
        self.failed_at = -math.inf
        """When a request failed through the server's fault, by the monotonic clock, unless one has succeeded since."""
        self.request_seconds: deque[float] = deque(maxlen=config.rolling_buffer_length)
        self._session: aiohttp.ClientSession | None = None

    async def post(self, url: str, body: object) -> Any:
        """Send a request and read the reply's JSON.

        Raises:
            EngineUnavailableError: no connection, a broken one, or a status that passes: 429, 5xx and the like.
            EngineRefusalError: any other status from 400 on.
            EngineError: the server did not answer in time, or not with JSON.
        """
        # Made here, for a session belongs to an event loop.
        self._session = self._session or self._open_session()
        started = time.monotonic()
        try:
            async with self._session.post(url, json=body) as response:
                content = await self._read(response)
                if response.status >= 400:
                    raise self.failure(response, content.decode(errors="replace"))
        except aiohttp.ClientError as reason:
            self.failed_at = time.monotonic()
            what = f"the endpoint {self.address} failed: {type(reason).__name__}: {one_line(str(reason))}"
            raise EngineUnavailableError(what, is_away=True) from reason
        except TimeoutError as reason:
            self.failed_at = time.monotonic()
            raise EngineError(f"the endpoint {self.address} did not answer within {self.config.timeout} s") from reason
        except EngineUnavailableError:
            self.failed_at = time.monotonic()
            raise
        self.failed_at = -math.inf
        self.request_seconds.append(time.monotonic() - started)
        return self._parsed(content)

    def failure(self, response: aiohttp.ClientResponse, text: str) -> Exception:
        """What is raised for a reply whose status is 400 or more."""
        status, pause = response.status, response.headers.get("Retry-After", "")
        what = f"the endpoint {self.address} refused: {status} {response.reason}: {one_line(text)}"
        if status < 500 and status not in _PASSING:
            return EngineRefusalError(what)
        return EngineUnavailableError(what, is_away=status in _AWAY, retry_after_s=_retry_after_s(pause))

    def parse(self, text: str) -> Any:
        """The JSON of a reply. Raises: ValueError, RecursionError: it is none."""
        return json.loads(text)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.config.api_key}"} if self.config.api_key else {},
            timeout=aiohttp.ClientTimeout(total=self.config.timeout, sock_connect=CONNECT_TIMEOUT_S),
            # How many connections there are is for `most_at_once` to say.
            connector=aiohttp.TCPConnector(limit=0, ssl=_ssl_context() if self.root.startswith("https:") else True),
            proxy=_proxy(self.address) if self.uses_proxies else None,
        )

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


def one_line(text: str, limit: int = 300) -> str:
    """The beginning of a text, for a message."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[:limit] + "..."


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


def _proxy(address: str) -> str | None:
    url = urllib.parse.urlsplit(address)
    return None if urllib.request.proxy_bypass(url.netloc) else urllib.request.getproxies().get(url.scheme)
