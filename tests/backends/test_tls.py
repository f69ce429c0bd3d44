"""Slot servers behind TLS: the certificate is verified, and nothing is sent to a server that cannot prove who it is."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backends.client import SlotServerClient
from backends.errors import SandboxUnavailableError

if shutil.which("openssl") is None:
    pytest.skip("openssl is not installed, which makes the certificate", allow_module_level=True)

BODY = b'{"layers": ["a"]}'


class TlsServer:
    """Answers each request with the same names of layers; `requests` is what came."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.requests: list[bytes] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            # The client has closed the connection.
            pass
        finally:
            writer.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that it has signed itself; its key is beside it."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=slot server", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *kind, *name, *files], check=True, capture_output=True)
    return certificate


@pytest.fixture
async def server(certificate: Path) -> AsyncIterator[TlsServer]:
    server, context = TlsServer(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0, ssl=context) as listener:
        server.port = listener.sockets[0].getsockname()[1]
        yield server


async def test_a_certificate_that_is_trusted(server: TlsServer, certificate: Path) -> None:
    async with SlotServerClient(url=f"https://127.0.0.1:{server.port}", token="secret", ca_file=certificate) as client:
        for _ in range(3):
            assert await client.layers() == ["a"]
        await asyncio.gather(client.layers(), client.layers())
    assert server.connections == 2
    assert len(server.requests) == 5
    assert all(b"Authorization: Bearer secret" in request for request in server.requests)


async def test_a_certificate_that_the_system_does_not_know(server: TlsServer) -> None:
    async with SlotServerClient(url=f"https://127.0.0.1:{server.port}", token="secret") as client:
        with pytest.raises(SandboxUnavailableError, match="certificate verify failed"):
            await client.layers()
    assert server.requests == []


async def test_a_certificate_of_somebody_else(server: TlsServer, certificate: Path) -> None:
    async with SlotServerClient(url=f"https://localhost:{server.port}", token="secret", ca_file=certificate) as client:
        with pytest.raises(SandboxUnavailableError, match="certificate verify failed"):
            await client.layers()
    assert server.requests == []


async def test_a_ca_file_that_is_missing(server: TlsServer, tmp_path: Path) -> None:
    async with SlotServerClient(url=f"https://127.0.0.1:{server.port}", ca_file=tmp_path / "missing") as client:
        with pytest.raises(SandboxUnavailableError, match="No such file"):
            await client.layers()
    assert server.connections == 0


async def test_a_server_that_does_not_speak_tls(certificate: Path) -> None:
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(1000))
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with SlotServerClient(url=f"https://127.0.0.1:{port}", token="secret", ca_file=certificate) as client:
            with pytest.raises(SandboxUnavailableError, match="no connection"):
                await client.layers()
    assert seen
    assert not any(b"secret" in data for data in seen)
