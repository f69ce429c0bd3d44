"""The network access of a box: an HTTP proxy that the server runs on a socket inside the box's network namespace.

The box has no interface but its loopback. Its programs ask the proxy for connections: `CONNECT` for HTTPS, absolute addresses
for plain HTTP (RFC 9110 section 9.3.6, RFC 9112 section 3.2.2). The proxy looks the name up, refuses every address that the
policy does not admit, and connects to the very address that it has checked, so that a name cannot mean another address in
between. This works for every user and in containers, and needs no other program.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sandbox_image.box.network import Destination, NetworkPolicy

PORT = 3128
"""Where the proxy listens in a box."""
ENVIRONMENT = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), f"http://127.0.0.1:{PORT}"),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1"),
}
"""The variables that tell programs of the proxy."""
MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 128
MAX_LOOKUPS = 4
MAX_ADDRESSES = 16
"""How many addresses of a host are tried; whoever owns the name decides how many it has."""
HEADER_TIMEOUT_S = 30.0
LOOKUP_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 15.0
IDLE_TIMEOUT_S = 300.0

_CHUNK = 64 * 1024
_HOP_BY_HOP = ("connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "trailer", "upgrade")
_LOG = logging.getLogger("sandbox_image")

Address = tuple[socket.AddressFamily, Any]
"""A family and what `connect` takes."""


class _RefusalError(Exception):
    """The proxy refuses a request; carries the HTTP status."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class _Request:
    """The request of a program in the box; `head` is to be forwarded, None for a tunnel."""

    host: str
    port: int
    head: bytes | None

    @classmethod
    def parse(cls, head: bytes) -> _Request:
        """Read a request line with the header fields after it."""
        line, *fields = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        try:
            method, target, version = line.split(" ")
            if not version.startswith("HTTP/1."):
                raise ValueError("not HTTP/1")
            if method == "CONNECT":
                where = Destination.parse(target)
                return cls(where.host, 443 if where.port is None else where.port, None)
            url = urlsplit(target)
            if url.scheme != "http" or not url.hostname:
                raise ValueError("not an absolute address")
            port = 80 if url.port is None else url.port
        except ValueError as error:
            reason = f"this is a proxy: CONNECT HOST:PORT, or http://HOST/PATH ({error})"
            raise _RefusalError("400 Bad Request", reason) from error
        path = target[len("http://") + len(url.netloc) :]
        kept = [field for field in fields if field.partition(":")[0].strip().lower() not in _HOP_BY_HOP]
        # One request per connection: the next one may be for another host, which has to be checked.
        lines = [f"{method} {path if path.startswith('/') else f'/{path}'} {version}", *kept, "Connection: close", "", ""]
        return cls(url.hostname, port, "\r\n".join(lines).encode("latin-1"))


class BoxProxy:
    """The proxy of one box, from its start until `close`."""

    def __init__(self, policy: NetworkPolicy, *, idle_timeout_s: float = IDLE_TIMEOUT_S) -> None:
        self._policy = policy
        self._idle_timeout_s = idle_timeout_s
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)

    async def serve(self, listening: socket.socket) -> None:
        """Accept connections from a listening socket, which this object owns from now on."""
        self._server = await asyncio.start_server(self._on_connection, sock=listening, limit=MAX_HEADER_BYTES)

    def close(self) -> None:
        """Accept no more connections and end the open ones."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        connection = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve_request(reader, writer)
        except _RefusalError as refusal:
            writer.write(_answer(refusal))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            _LOG.debug("a connection of a box ended: %s", error)
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        # What is left in the buffer is still sent, in the background.
        writer.close()

    async def _serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError as error:
            raise _RefusalError("431 Request Header Fields Too Large", f"more than {MAX_HEADER_BYTES} bytes") from error
        request = _Request.parse(head)
        upstream_reader, upstream_writer = await self._connect(request)
        try:
            if request.head is None:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                upstream_writer.write(request.head)
            await self._relay((reader, upstream_writer), (upstream_reader, writer))
        finally:
            upstream_writer.transport.abort()

    async def _connect(self, request: _Request) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first admitted address of a host that answers."""
        where = f"{request.host}:{request.port}"
        addresses = await self._look_up(request.host, request.port)
        admitted = [address for address in addresses if self._policy.admits(request.host, request.port, address[1][0])]
        if not admitted:
            raise _RefusalError("403 Forbidden", f"{where} is not on the internet, and slots reach nothing else")
        failure = "it does not answer"
        for family, address in admitted:
            connecting = socket.socket(family, socket.SOCK_STREAM)
            try:
                connecting.setblocking(False)
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_connect(connecting, address)
                return await asyncio.open_connection(sock=connecting, limit=MAX_HEADER_BYTES)
            except (OSError, TimeoutError) as error:
                connecting.close()
                failure = str(error) or failure
            except BaseException:
                connecting.close()
                raise
        raise _RefusalError("502 Bad Gateway", f"cannot connect to {where}: {failure}")

    async def _look_up(self, host: str, port: int) -> Sequence[Address]:
        await self._lookups.acquire()
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                return (await _resolve(host, port, self._lookups))[:MAX_ADDRESSES]
        except TimeoutError:
            raise _RefusalError("504 Gateway Timeout", f"no answer to the question where {host} is") from None
        except (OSError, UnicodeError) as error:
            raise _RefusalError("502 Bad Gateway", f"nobody knows where {host} is: {error}") from error

    async def _relay(
        self,
        outward: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        inward: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Copy bytes both ways until the server closes its side, or until nothing has moved for the idle timeout."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._idle_timeout_s) as limit:

            async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while chunk := await reader.read(_CHUNK):
                    limit.reschedule(loop.time() + self._idle_timeout_s)
                    writer.write(chunk)
                    await writer.drain()
                if writer.can_write_eof():
                    writer.write_eof()

            sending = asyncio.create_task(pump(*outward))
            try:
                await pump(*inward)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)


def _answer(refusal: _RefusalError) -> bytes:
    body = f"{refusal}\n".encode()
    fields = ("Content-Type: text/plain", f"Content-Length: {len(body)}", "Connection: close")
    return "\r\n".join([f"HTTP/1.1 {refusal.status}", *fields, "", ""]).encode() + body


async def _resolve(host: str, port: int, lookups: asyncio.Semaphore) -> Sequence[Address]:
    """All addresses of a host; releases the semaphore when the resolver has answered, even if the caller was cancelled.

    The machine's resolver blocks: it is called in a daemon thread, so that neither the thread pool that serves all slots nor
    the end of the server waits for it.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Address]] = loop.create_future()

    def settle(found: list[Address], error: OSError | UnicodeError | None) -> None:
        lookups.release()
        if answer.done():
            return
        if error is None:
            answer.set_result(found)
        else:
            answer.set_exception(error)

    def ask() -> None:
        found: list[Address] = []
        failure: OSError | UnicodeError | None = None
        try:
            found = [(entry[0], entry[4]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as error:
            failure = error
        # The loop may be closed by now.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, found, failure)

    try:
        threading.Thread(target=ask, daemon=True, name="resolver").start()
    except RuntimeError as error:
        lookups.release()
        raise OSError(errno.EAGAIN, "no thread to be had") from error
    return await answer
