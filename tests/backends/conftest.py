"""What the tests of the backends share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from backends.client import SlotServerClient

Reply = Callable[["Visit"], Awaitable[None]]


@dataclass
class Visit:
    """One HTTP request that reached a `LyingServer`; `number` counts from 0."""

    number: int
    route: str
    payload: Any
    writer: asyncio.StreamWriter

    async def send(self, raw: bytes) -> None:
        """Answer with these very bytes."""
        self.writer.write(raw)
        await self.writer.drain()

    async def answer(self, payload: object, *, status: int = 200) -> None:
        """Answer properly with JSON."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.send(head.encode() + body)

    async def start_stream(self) -> None:
        """Begin a chunked answer."""
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        """Go on with a chunked answer; empty data ends it."""
        await self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def line(self, payload: object) -> None:
        """Stream one line of JSON."""
        await self.chunk(json.dumps(payload).encode() + b"\n")

    def hang_up(self) -> None:
        """Close the connection."""
        self.writer.close()


@dataclass
class LyingServer:
    """An HTTP server that answers whatever a test wants, byte by byte.

    It has no slots and runs nothing: it stands for the other end of the wire only.
    """

    client: SlotServerClient
    visits: list[Visit] = field(default_factory=list)

    @property
    def routes(self) -> list[str]:
        """The routes that were asked for, in order."""
        return [visit.route for visit in self.visits]


@pytest.fixture
async def lying_server() -> AsyncIterator[Callable[..., Awaitable[LyingServer]]]:
    """Starts servers that answer with the given function, each with a client for it."""
    opened: list[asyncio.Server] = []
    clients: list[SlotServerClient] = []

    async def start(reply: Reply, **client_options: Any) -> LyingServer:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while not writer.is_closing():
                    head = await reader.readuntil(b"\r\n\r\n")
                    lines = head.decode().split("\r\n")
                    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
                    body = await reader.readexactly(int(headers.get("content-length", "0")))
                    visit = Visit(len(server.visits), lines[0].split()[1], json.loads(body) if body else None, writer)
                    server.visits.append(visit)
                    await reply(visit)
            except (asyncio.IncompleteReadError, ConnectionError):
                # The client closed the connection.
                pass
            finally:
                writer.close()

        listener = await asyncio.start_server(connected, "127.0.0.1", 0)
        opened.append(listener)
        client = SlotServerClient(url=f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", **client_options)
        clients.append(client)
        server = LyingServer(client)
        return server

    yield start
    for client in clients:
        await client.close()
    for listener in opened:
        listener.close()
        await listener.wait_closed()
