"""More connections at once than a unix socket queues: each is made when there is room, none is lost."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from backends.http import HttpAnswer, HttpClient

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


async def ask(client: HttpClient) -> bytes:
    async with client.request("GET", "/", b"") as answer:
        assert isinstance(answer, HttpAnswer)
        return await answer.body(10)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER)
    await writer.drain()
    writer.close()


async def test_a_full_queue_of_connections_is_waited_for(short_path: Path) -> None:
    path = short_path / "socket"
    listener = socket.socket(socket.AF_UNIX)
    client = HttpClient(url=None, unix_socket=path, headers={})
    try:
        listener.bind(str(path))
        listener.listen(1)
        asked = [asyncio.create_task(ask(client)) for _ in range(20)]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in asked)
        # The control: the queue is full.
        refused = socket.socket(socket.AF_UNIX)
        refused.setblocking(False)
        with refused, pytest.raises(BlockingIOError):
            refused.connect(str(path))
        async with await asyncio.start_unix_server(answer, sock=listener):
            assert await asyncio.gather(*asked) == [b"hi"] * 20
    finally:
        await client.close()
        listener.close()
