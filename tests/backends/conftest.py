"""What the tests of the backends share."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from backends import BackendOptions, ToolBackend, create_tool_backend
from backends.client import SlotServerClient

Reply = Callable[["Visit"], Awaitable[None]]


@dataclass
class Visit:
    """One HTTP request that reached a `LyingServer`; `number` counts from 0."""

    number: int
    route: str
    payload: Any
    reader: asyncio.StreamReader
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
    connections: int = 0

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
            server.connections += 1
            try:
                while not writer.is_closing():
                    head = await reader.readuntil(b"\r\n\r\n")
                    lines = head.decode().split("\r\n")
                    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
                    body = await reader.readexactly(int(headers.get("content-length", "0")))
                    visit = Visit(len(server.visits), lines[0].split()[1], json.loads(body) if body else None, reader, writer)
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


class Provider(Protocol):
    """How the conformance suite gets a backend, and hurts it."""

    def make(self, **options: Any) -> ToolBackend:
        """A backend that has not been started; `slots` is how many it shall have."""

    def kill(self) -> None:
        """Kill its only sandbox, as hard as can be."""

    def remains(self) -> list[str]:
        """What is left of all backends made so far: processes and files."""


class LocalProvider:
    """The local backend, in a directory that belongs to one test or module."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make(self, *, slots: int = 4, **options: Any) -> ToolBackend:
        return create_tool_backend(BackendOptions(local_slots=slots, local_data_dir=str(self.directory), **options))

    def kill(self) -> None:
        (pid,) = [pid for pid, command in processes() if str(self.directory) in command and parent(pid) == os.getpid()]
        os.kill(pid, signal.SIGKILL)

    def remains(self) -> list[str]:
        return remains_below(self.directory)


def processes() -> Iterator[tuple[int, str]]:
    """All processes that can be seen, with their command lines; zombies have none."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                command = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            yield int(name), command.replace(b"\0", b" ").decode(errors="replace")


def remains_below(directory: Path) -> list[str]:
    """Processes whose command line names the directory, and what is in it."""
    running = [f"{pid}: {command}" for pid, command in processes() if str(directory) in command and pid != os.getpid()]
    return running + ([str(path) for path in directory.iterdir()] if directory.exists() else [])


def parent(pid: int) -> int | None:
    """The process id of a process' parent."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])


PROVIDERS = {"local": LocalProvider}


@pytest.fixture(scope="module", params=list(PROVIDERS))
def provider_name(request: pytest.FixtureRequest) -> str:
    """The backends that the conformance suite runs on."""
    return str(request.param)


@pytest.fixture
def provider(provider_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    """For tests that need a backend of their own; nothing may be left of it."""
    provider = PROVIDERS[provider_name](tmp_path_factory.mktemp("own"))
    yield provider
    assert provider.remains() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(provider_name: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ToolBackend]:
    """A backend with four slots for tests that leave it as they found it; nothing may be left of it at the end."""
    provider = PROVIDERS[provider_name](tmp_path_factory.mktemp("shared"))
    async with provider.make(slots=4, acquire_timeout_s=30) as backend:
        yield backend
    assert provider.remains() == []


@pytest.fixture
def remains() -> Callable[[Path], list[str]]:
    """What backends have left in or around a directory: processes and files."""
    return remains_below
