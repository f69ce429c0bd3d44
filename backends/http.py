"""A small HTTP/1.1 client with kept connections.

With aiohttp's client a call of `true` takes 1.2 times as long (`benchmarks/tool_call.py`). This one does what a slot server
needs and refuses the rest: every answer has a length or is chunked, nothing is decompressed, no redirect is followed, and the
caller bounds what it reads.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from backends.errors import SandboxProtocolError, SandboxUnavailableError

CONNECT_TIMEOUT_S = 10.0
_BUSY_PAUSE_S = 0.005
_BUFFER_BYTES = 1 << 16  # also the longest head of an answer
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([2-5]\d\d)(?: [^\r\n]*)?")
_LENGTH = re.compile(rb"\d{1,18}")
_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


class NotDeliveredError(SandboxUnavailableError):
    """No connection could be made, so the request was not executed."""


class ConnectionLostError(SandboxUnavailableError):
    """The connection broke after the request was sent; it may have been executed or not."""


class HttpAnswer:
    """The head of an answer, and the way to the rest of it."""

    def __init__(self, reader: asyncio.StreamReader, head: bytes) -> None:
        lines = head.split(b"\r\n")[:-2]
        status_line = _STATUS_LINE.fullmatch(lines[0])
        if status_line is None:
            raise SandboxProtocolError(f"the slot server does not speak HTTP: {lines[0][:100]!r}")
        headers: dict[bytes, bytes] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            name = name.lower()
            if not colon or (name in headers and name in (b"content-length", b"transfer-encoding")):
                raise SandboxProtocolError(f"the slot server sent a broken header: {line[:100]!r}")
            headers[name] = value.strip()
        self.status = int(status_line[2])
        self.complete = False
        self._reader = reader
        connection = headers.get(b"connection", b"").lower()
        self.keep_alive = connection != b"close" and (status_line[1] == b"1" or connection == b"keep-alive")
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        length = headers.get(b"content-length")
        if self._chunked == (length is not None) or (length is not None and not _LENGTH.fullmatch(length)):
            raise SandboxProtocolError("the slot server sent an answer without a proper length")
        self._length = int(length or 0)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        if not self._chunked:
            async for piece in self._exactly(self._length):
                yield piece
        else:
            while size := await self._chunk_size():
                async for piece in self._exactly(size):
                    yield piece
                if await self._reader.readexactly(2) != b"\r\n":
                    raise SandboxProtocolError("the slot server sent a broken chunk")
            if await self._reader.readexactly(2) != b"\r\n":
                raise SandboxProtocolError("the slot server sent something after its answer")
        self.complete = True

    async def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            SandboxProtocolError: it is longer than `limit` bytes.
        """
        if not self._chunked and self._length <= min(limit, _BUFFER_BYTES):
            short = await self._reader.readexactly(self._length)
            self.complete = True
            return short
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > limit:
                raise SandboxProtocolError(f"the server's answer is longer than {limit} bytes")
        return bytes(body)

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            piece = await self._reader.read(min(size, _BUFFER_BYTES))
            if not piece:
                raise EOFError
            size -= len(piece)
            yield piece

    async def _chunk_size(self) -> int:
        head = _CHUNK_HEAD.fullmatch(await self._reader.readuntil(b"\r\n"))
        if head is None:
            raise SandboxProtocolError("the slot server sent a broken chunk")
        return int(head[1], 16)


class HttpClient:
    """Requests to one server, each on a connection of its own while it lasts; idle connections are used again."""

    def __init__(
        self, *, url: str | None, unix_socket: Path | None, headers: Mapping[str, str], ca_file: Path | None = None
    ) -> None:
        """`url` like `http://host:port/prefix` or `https://...`, or `unix_socket`; exactly one of them.

        Over https the server's certificate and name are verified: against the certificates in `ca_file` (PEM) alone, or
        against those that the system trusts.
        """
        if (url is None) == (unix_socket is None):
            raise ValueError("exactly one of url and unix_socket is needed")
        # A request needs a host; over a unix socket it is not looked at.
        self._url = urlsplit(url or "http://slot-server")
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"not a URL of http or https: {url!r}")
        self._unix_socket = unix_socket
        self._ca_file = ca_file
        self._tls: ssl.SSLContext | None = None
        fixed = {"Host": self._url.netloc, "Content-Type": "application/json", **headers}
        self._fixed_head = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())
        self._idle: list[asyncio.StreamWriter] = []
        self._readers: dict[asyncio.StreamWriter, asyncio.StreamReader] = {}
        self._closed = False

    async def close(self) -> None:
        """Drop all connections; requests under way end in `SandboxUnavailableError`."""
        self._closed = True
        writers = list(self._readers)
        for writer in writers:
            self._drop(writer)
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    @asynccontextmanager
    async def request(
        self, method: str, route: str, body: bytes, *, accept: str = "application/json"
    ) -> AsyncIterator[HttpAnswer]:
        """Send a request and read the head of its answer; what breaks while the block reads the rest is translated, too.

        Raises:
            NotDeliveredError, ConnectionLostError: no answer, or only a part of it.
            SandboxProtocolError: what came is not HTTP as it should be.
        """
        writer = await self._connection()
        answer = None
        try:
            if self._closed:
                # While the connection was being made.
                raise SandboxUnavailableError("the connection to the slot server was closed")
            own = f"Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(f"{method} {self._url.path}{route} HTTP/1.1\r\n{self._fixed_head}{own}".encode() + body)
            await writer.drain()
            reader = self._readers[writer]
            answer = HttpAnswer(reader, await reader.readuntil(b"\r\n\r\n"))
            yield answer
        except asyncio.LimitOverrunError as error:
            raise SandboxProtocolError("the slot server does not speak HTTP: no end of a line in sight") from error
        except (OSError, EOFError) as error:
            # What broke this connection has broken the idle ones, too: a second attempt needs a new one.
            while self._idle:
                self._drop(self._idle.pop())
            raise ConnectionLostError(f"the connection to the slot server broke: {error or type(error).__name__}") from error
        finally:
            if answer is not None and answer.complete and answer.keep_alive and not self._closed:
                self._idle.append(writer)
            else:
                self._drop(writer)

    async def _connection(self) -> asyncio.StreamWriter:
        if self._closed:
            raise SandboxUnavailableError("the connection to the slot server was closed")
        while self._idle:
            writer = self._idle.pop()
            if not writer.is_closing() and not self._readers[writer].at_eof():
                return writer
            self._drop(writer)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await self._connect()
        except OSError as error:
            raise NotDeliveredError(f"no connection to the slot server: {error or type(error).__name__}") from error
        self._readers[writer] = reader
        return writer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._unix_socket is not None:
            return await _connect_unix(self._unix_socket)
        if self._url.scheme == "https" and self._tls is None:
            # It reads files.
            self._tls = await asyncio.to_thread(ssl.create_default_context, cafile=self._ca_file)
        port = self._url.port or (80 if self._tls is None else 443)
        return await asyncio.open_connection(self._url.hostname, port, ssl=self._tls, limit=_BUFFER_BYTES)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._readers.pop(writer, None)
        writer.transport.abort()


async def _connect_unix(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a unix socket, once its server has room for it.

    A full queue of connections refuses with EAGAIN, which asyncio takes for a connection under way and then for an established
    one: only that it has no peer tells it from a real one.
    """
    while True:
        reader, writer = await asyncio.open_unix_connection(path, limit=_BUFFER_BYTES)
        if writer.get_extra_info("peername") is not None:
            return reader, writer
        writer.transport.abort()
        await asyncio.sleep(_BUSY_PAUSE_S)
