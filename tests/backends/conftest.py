"""What the tests of the backends share."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sysconfig
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from backends import BackendOptions, LocalBackend, LocalOptions, ToolBackend, create_tool_backend, options_with
from backends.client import SlotServerClient
from tests.sandbox_image.running import ROOT, as_other_user, open_directory
from tests.support.processes import mentioning

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

    def __init__(self, directory: Path, kind: type[LocalBackend] = LocalBackend) -> None:
        self.directory = directory
        self._kind = kind

    def make(self, *, slots: int = 4, **options: Any) -> ToolBackend:
        return self._kind(LocalOptions(local_slots=slots, local_data_dir=str(self.directory), **options))

    def kill(self) -> None:
        (server,) = [process for process in mentioning(str(self.directory)) if process.parent == os.getpid()]
        os.kill(server.pid, signal.SIGKILL)

    def remains(self) -> list[str]:
        return remains_below(self.directory)


class NamedProvider:
    """A backend that `--backend` names, with the options that `--backend-option` gives it; it has the slots that it has."""

    def __init__(self, name: str, given: Sequence[str]) -> None:
        self._name = name
        self._given = dict(option.split("=", 1) for option in given)

    def make(self, *, slots: int = 4, **options: Any) -> ToolBackend:
        kind = options_with(BackendOptions, self._name)
        return create_tool_backend(kind(tool_pool_mode=self._name, **self._given, **options))

    def kill(self) -> None:
        pytest.skip("nobody knows how to kill a sandbox of this backend")

    def remains(self) -> list[str]:
        return []


def remains_below(directory: Path) -> list[str]:
    """Processes whose command line names the directory, and what is in it."""
    running = [f"{process.pid}: {process.command}" for process in mentioning(str(directory)) if process.pid != os.getpid()]
    return running + ([str(path) for path in directory.iterdir()] if directory.exists() else [])


OWN_USER, ORDINARY_USER = "local", "local, ordinary user"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("backends")
    group.addoption(
        "--backend", metavar="NAME", help="run the conformance suite on this backend: a name or package.module:Class"
    )
    group.addoption("--backend-option", metavar="NAME=VALUE", action="append", default=[], help="an option of it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the conformance suite on the local backend, as whoever runs it and as an ordinary user where that may matter."""
    if "provider_name" in metafunc.fixturenames:
        # It is known only if this file is below a path on the command line.
        named = metafunc.config.getoption("--backend", None)
        users = [OWN_USER] if metafunc.definition.get_closest_marker("any_user") else [OWN_USER, ORDINARY_USER]
        metafunc.parametrize("provider_name", [named] if named else users, scope="module")


@contextmanager
def open_provider(name: str, config: pytest.Config) -> Iterator[Provider]:
    """A provider, in a directory of its own; nothing may be left of its backends."""
    with open_directory(other_user=name == ORDINARY_USER) as directory:
        provider: Provider
        if name == OWN_USER:
            provider = LocalProvider(directory / "data")
        elif name == ORDINARY_USER:
            provider = LocalProvider(directory / "data", backend_of_ordinary_user(directory))
        else:
            provider = NamedProvider(name, config.getoption("--backend-option"))
        yield provider
        assert provider.remains() == []


def backend_of_ordinary_user(directory: Path) -> type[LocalBackend]:
    """A local backend whose slot server belongs to an ordinary user; skips the test where there cannot be one."""
    *become, python = as_other_user(directory)
    path = f"PYTHONPATH={ROOT}:{sysconfig.get_path('purelib')}"

    class BackendOfOrdinaryUser(LocalBackend):
        interpreter = (*become, "env", path, python)

    return BackendOfOrdinaryUser


@pytest.fixture
def provider(provider_name: str, request: pytest.FixtureRequest) -> Iterator[Provider]:
    """For tests that need a backend of their own; nothing may be left of it."""
    with open_provider(provider_name, request.config) as provider:
        yield provider


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(provider_name: str, request: pytest.FixtureRequest) -> AsyncIterator[ToolBackend]:
    """A backend with four slots for tests that leave it as they found it; nothing may be left of it at the end."""
    with open_provider(provider_name, request.config) as provider:
        async with provider.make(slots=4, acquire_timeout_s=60) as backend:
            yield backend


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for sockets, the paths of which may have 107 bytes; the names that pytest gives can be too long."""
    with open_directory() as directory:
        yield directory


@pytest.fixture
def remains() -> Callable[[Path], list[str]]:
    """What backends have left in or around a directory: processes and files."""
    return remains_below
