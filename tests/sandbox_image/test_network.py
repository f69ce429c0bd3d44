"""The way out of a box: who may be reached through the proxy, what it answers, and programs that use it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandbox_image.box.network import Destination, NetworkPolicy, is_outside
from sandbox_image.box.proxy import MAX_HEADER_BYTES, BoxProxy
from tests.sandbox_image.running import Api, running, server_command
from tests.support.small_task import git
from tests.support.users import USERS
from tests.support.waiting import PATIENCE_S
from tests.support.web_site import ADDRESS, site


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_the_internet_is_outside(address: str) -> None:
    assert is_outside(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7"),
        *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *(
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::127.0.0.1",
            "fe80::1",
            "fe80::1%lo",
            "fd00:ec2::254",
            "fc00::1",
        ),
        *(
            "fec0::1",
            "ff02::1",
            "ff0e::1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "3fff::1",
        ),
        *("localhost", "", "127.1"),
    ],
)
def test_what_is_not_outside(address: str) -> None:
    assert not is_outside(address)


def test_the_machines_own_addresses_are_not_outside() -> None:
    shown = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    assert not [address for address in shown if is_outside(address)]


def test_destinations() -> None:
    assert Destination.parse("Index.Example.") == Destination("index.example", None)
    assert Destination.parse("[::1]:80") == Destination("::1", 80)
    assert Destination.parse("index.example:80").covers("INDEX.example.", 80)
    assert not Destination.parse("index.example:80").covers("index.example", 81)
    assert not Destination.parse("index.example").covers("www.index.example", 80)
    for text in ("", "a b", "http://a", "a/b", "user@a", "a:", "a:x", "a:99999", ":80"):
        with pytest.raises(ValueError, match=r"HOST|[Pp]ort|netloc"):
            Destination.parse(text)


class Far:
    """A server that says `seen` and then what it was sent, in capital letters."""

    def __init__(self) -> None:
        self.connections = 0
        self.gone = asyncio.Event()

    async def start(self) -> asyncio.Server:
        """Listen on the loopback."""
        self._server = await asyncio.start_server(self._serve, ADDRESS, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self._server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(b"seen ")
        try:
            while chunk := await reader.read(1000):
                writer.write(chunk.upper())
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.gone.set()


@pytest.fixture
async def far() -> AsyncIterator[Far]:
    """Somebody to talk to."""
    made = Far()
    async with await made.start():
        yield made


async def open_proxy(policy: NetworkPolicy, **options: float) -> tuple[BoxProxy, int]:
    """A proxy on the host's loopback; in a box it differs by where its socket came from."""
    listening = socket.create_server(("127.0.0.1", 0))
    proxy = BoxProxy(policy, **options)
    port = listening.getsockname()[1]
    await proxy.serve(listening)
    return proxy, port


async def say(port: int, text: bytes, *, half_close: bool = True) -> bytes:
    """All that the proxy answers, until it closes the connection or resets it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(text)
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            while chunk := await reader.read(1000):
                answer += chunk
    except ConnectionError:
        return answer
    finally:
        writer.close()
    return answer


async def test_a_tunnel_to_an_allowed_host(far: Far) -> None:
    proxy, port = await open_proxy(NetworkPolicy((Destination(ADDRESS, far.port),)))
    answer = await say(port, b"CONNECT %s:%d HTTP/1.1\r\nHost: x\r\n\r\nhello" % (ADDRESS.encode(), far.port))
    assert answer == b"HTTP/1.1 200 Connection established\r\n\r\nseen HELLO"
    proxy.close()


async def test_a_request_to_an_allowed_host(far: Far) -> None:
    proxy, port = await open_proxy(NetworkPolicy((Destination(ADDRESS, None),)))
    fields = b"Host: x\r\nProxy-Authorization: secret\r\nConnection: keep-alive\r\nX-Kept: y"
    answer = await say(port, b"POST http://%s:%d/a/b?c=d HTTP/1.1\r\n%s\r\n\r\nbody" % (ADDRESS.encode(), far.port, fields))
    assert answer == b"seen POST /A/B?C=D HTTP/1.1\r\nHOST: X\r\nX-KEPT: Y\r\nCONNECTION: CLOSE\r\n\r\nBODY"
    answer = await say(port, b"GET http://%s:%d?c HTTP/1.0\r\n\r\n" % (ADDRESS.encode(), far.port))
    assert answer.startswith(b"seen GET /?C HTTP/1.0\r\n")
    proxy.close()


@pytest.mark.parametrize(
    "host", ["127.0.0.2", "127.2", "2130706434", "0x7f.0.0.2", "localhost", "[::ffff:127.0.0.2]", "0.0.0.0"]
)
async def test_names_of_the_loopback_are_refused_after_they_are_looked_up(far: Far, host: str) -> None:
    proxy, port = await open_proxy(NetworkPolicy((Destination("elsewhere", None), Destination(ADDRESS, far.port + 1))))
    for line in ("CONNECT {}:{} HTTP/1.1", "GET http://{}:{}/ HTTP/1.1"):
        answer = await say(port, f"{line.format(host, far.port)}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n"), answer
        assert b"slots reach nothing else" in answer
    assert far.connections == 0
    proxy.close()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET ftp://x/ HTTP/1.1\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"CONNECT http://x/ HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT x:99999 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://x:y/ HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT x:1 SSH-2.0\r\n\r\n", b"400"),
        (b"\xff\xfe\r\n\r\n", b"400"),
        (b"GET http://x/ HTTP/1.1\r\nA: " + b"b" * MAX_HEADER_BYTES + b"\r\n\r\n", b"431"),
        (b"GET http://name.invalid/ HTTP/1.1\r\n\r\n", b"502"),
        (b"GET http://%s/ HTTP/1.1\r\n\r\n" % (b"x" * 300), b"502"),
        (b"GET http://[::1/ HTTP/1.1\r\n\r\n", b"400"),
    ],
)
async def test_what_it_does_not_understand(text: bytes, status: bytes) -> None:
    proxy, port = await open_proxy(NetworkPolicy())
    answer = await say(port, text, half_close=False)
    # What was sent and not read resets the connection, which may overtake the answer.
    assert answer.startswith(b"HTTP/1.1 " + status) or (status == b"431" and answer == b""), answer
    assert await say(port, b"GET") == b""
    proxy.close()


async def test_nobody_at_an_allowed_address() -> None:
    with socket.create_server((ADDRESS, 0)) as free:
        closed = free.getsockname()[1]
    proxy, port = await open_proxy(NetworkPolicy((Destination(ADDRESS, None),)))
    answer = await say(port, b"CONNECT %s:%d HTTP/1.1\r\n\r\n" % (ADDRESS.encode(), closed))
    assert answer.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
    proxy.close()


async def test_a_connection_on_which_nothing_moves_ends(far: Far) -> None:
    proxy, port = await open_proxy(NetworkPolicy((Destination(ADDRESS, None),)), idle_timeout_s=0.2)
    tunnel = b"CONNECT %s:%d HTTP/1.1\r\n\r\n" % (ADDRESS.encode(), far.port)
    assert (await say(port, tunnel, half_close=False)).endswith(b"seen ")
    async with asyncio.timeout(PATIENCE_S):
        await far.gone.wait()
    proxy.close()


async def test_connections_end_with_the_proxy(far: Far) -> None:
    proxy, port = await open_proxy(NetworkPolicy((Destination(ADDRESS, None),)))
    tunnel = b"CONNECT %s:%d HTTP/1.1\r\n\r\n" % (ADDRESS.encode(), far.port)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(tunnel)
    assert await reader.readuntil(b"seen ")
    proxy.close()
    async with asyncio.timeout(PATIENCE_S):
        await far.gone.wait()
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.parametrize("other_user", [False, True], ids=USERS)
async def test_programs_in_a_box(tmp_path: Path, other_user: bool) -> None:
    work = tmp_path / "work"
    work.mkdir()
    git(work, "init", "--quiet")
    (work / "file").write_text("from the repository\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "first")
    git(tmp_path, "clone", "--quiet", "--bare", "work", "site/repository.git")
    git(tmp_path / "site/repository.git", "update-server-info")
    (tmp_path / "site/page").write_text("a page\n")
    with site(tmp_path / "site") as port, running("--network-allow", f"{ADDRESS}:{port}", other_user=other_user) as server:
        api, closed = Api.over(server), f"http://{ADDRESS}:{port + 1}/"
        async with api.session:
            assert (await api.reset(network=True))["network"]
            url = f"http://{ADDRESS}:{port}"
            assert (
                await api.output("tail -n +3 /proc/net/dev | wc -l; ls /etc/resolv.conf 2>&1 | grep -c 'No such'") == "1\n1\n"
            )
            read = f"python3 -c 'import urllib.request as u; print(u.urlopen(\"{url}/page\").read())'"
            assert await api.output(read) == "b'a page\\n'\n"
            assert await api.output(f"git clone --quiet {url}/repository.git && cat repository/file") == "from the repository\n"
            tunnel = (
                "import http.client; c = http.client.HTTPConnection('127.0.0.1', 3128); "
                f"c.set_tunnel('{ADDRESS}', {port}); c.request('GET', '/page'); print(c.getresponse().read())"
            )
            assert await api.output(f'python3 -c "{tunnel}"') == "b'a page\\n'\n"
            for refused in (closed, "http://169.254.169.254/latest/meta-data/", "http://127.0.0.3:1/"):
                result = await api.bash(read.replace(f"{url}/page", refused))
                assert "HTTP Error 403" in result["output"], (refused, result)
            direct = f"import socket; socket.create_connection(('{ADDRESS}', {port}), 3)"
            assert not (await api.bash(f'python3 -c "{direct}"'))["success"]
            assert await Api(api.session, "slot_1").output("env | grep -ci _proxy || true") == "0\n"
            await api.reset()
            assert await api.output("env | grep -ci _proxy || true") == "0\n"
            assert (
                "refused"
                in (await api.bash("python3 -c \"import socket; socket.create_connection(('127.0.0.1', 3128))\""))["output"]
            )


def test_what_is_no_host_cannot_be_allowed(tmp_path: Path) -> None:
    command = [sys.executable, *server_command(tmp_path, "--network-allow", "http://x/")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert "'http://x/' is not HOST or HOST:PORT" in ended.stderr
