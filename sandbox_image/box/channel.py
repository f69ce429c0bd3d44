"""The socket between the server and the init of a box; the messages are described in `sandbox_image.init`."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox_image import pieces
from sandbox_image.errors import BoxError
from sandbox_image.init import BY_REFERENCE, PACKET_BYTES

_REPLY_BYTES = 4096
_CREDENTIALS = struct.Struct("3i")
_DESCRIPTOR = struct.Struct("i")
_REPLY_ANCILLARY_BYTES = socket.CMSG_SPACE(_DESCRIPTOR.size)


@dataclass(frozen=True)
class Reply:
    """The init's answer to an order."""

    kind: bytes
    text: bytes
    descriptors: list[int] = field(default_factory=list)


class InitChannel:
    """The server's end. Each order has a number, which the init's reply repeats."""

    def __init__(self, *, on_reply: Callable[[], None], on_lost: Callable[[str], None]) -> None:
        """`on_reply` is called before a reply is handed out, `on_lost` with the reason when the connection has ended."""
        self.hello: asyncio.Future[tuple[int, dict[str, str]]] = asyncio.get_running_loop().create_future()
        """The init's process id on the host, and what it reports: see `sandbox_image.init.facts`."""
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._orders = 0
        self._answers: dict[bytes, asyncio.Future[Reply]] = {}
        self._exits: dict[bytes, asyncio.Future[int]] = {}
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        # The kernel adds the sender's process id to the first packet; the init itself only knows that it is 1 in its namespace.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    @property
    def their_end(self) -> int:
        """The descriptor for the init to inherit."""
        return self._theirs.fileno()

    def open(self) -> None:
        """Begin to listen, after the init has been started with its end."""
        self._theirs.close()
        asyncio.get_running_loop().add_reader(self._socket, self._on_hello)

    def close(self) -> None:
        """Close both ends."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._theirs.close()

    def shut_down(self) -> None:
        """Let the init see the end of the connection."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def fail(self, error: BoxError) -> None:
        """Let everything that waits for the init fail."""
        waiting: list[asyncio.Future[Any]] = [self.hello, *self._answers.values(), *self._exits.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                # Retrieved, so that nothing is logged if no task waits for it.
                future.exception()

    def new_number(self) -> bytes:
        """A number for an order."""
        self._orders += 1
        return b"%d" % self._orders

    def exit_of(self, number: bytes) -> asyncio.Future[int]:
        """The future exit status of a kept command; to be asked for before the order is sent."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exits[number] = future
        return future

    def forget(self, number: bytes) -> None:
        """Do not wait for that kept command any more."""
        self._exits.pop(number, None)

    async def ask(self, kind: bytes, number: bytes, *parts: bytes, descriptors: Sequence[int] = ()) -> asyncio.Future[Reply]:
        """Send an order that is answered; returns the future reply, which fails with a `BoxError` if the box dies.

        Raises:
            BoxError: it cannot be sent.
        """
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            head, last = b"\0".join((kind, number, *parts[:-1], b"")), parts[-1]
            if len(head) + len(last) <= PACKET_BYTES:
                self._send(head + last, descriptors)
            else:
                await self._send_by_reference(head, last, descriptors)
        except BaseException:
            del self._answers[number]
            raise
        return answer

    def order(self, kind: bytes, number: bytes) -> None:
        """Send an order that has no reply.

        Raises:
            BoxError: it cannot be sent.
        """
        self._send(b"\0".join((kind, number)), ())

    async def _send_by_reference(self, head: bytes, last: bytes, descriptors: Sequence[int]) -> None:
        file = os.memfd_create("message")
        try:
            await pieces.fill(file, head, last)
            self._send(BY_REFERENCE, (file, *descriptors))
        finally:
            os.close(file)

    def _send(self, packet: bytes, descriptors: Sequence[int]) -> None:
        try:
            if descriptors:
                socket.send_fds(self._socket, [packet], list(descriptors))
            else:
                self._socket.send(packet)
        except OSError as error:
            raise BoxError(f"the box does not take a command: {error.strerror}") from error

    def _on_hello(self) -> None:
        received = self._receive(PACKET_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
        if received is None:
            return
        packet, ancillary = received
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        asyncio.get_running_loop().add_reader(self._socket, self._on_message)
        pids = [_CREDENTIALS.unpack_from(payload)[0] for _, kind, payload in ancillary if kind == socket.SCM_CREDENTIALS]
        if not pids:
            self._on_lost("the kernel does not tell which process its init is")
        elif not self.hello.done():
            lines = packet.split(b"\0", 1)[1].decode(errors="replace").splitlines()
            self.hello.set_result((pids[0], dict(line.split(":\t", 1) for line in lines if ":\t" in line)))

    def _on_message(self) -> None:
        received = self._receive(_REPLY_BYTES, _REPLY_ANCILLARY_BYTES)
        if received is None:
            return
        packet, ancillary = received
        self._on_reply()
        kind, number, text = packet.split(b"\0")
        descriptors = [_DESCRIPTOR.unpack_from(payload)[0] for _, _, payload in ancillary]
        answer, end = self._answers.pop(number, None), self._exits.get(number)
        if kind == b"exit" and end is not None:
            del self._exits[number]
            if not end.done():
                end.set_result(int(text))
        elif answer is not None and not answer.done():
            answer.set_result(Reply(kind, text, descriptors))
        else:
            for descriptor in descriptors:
                os.close(descriptor)

    def _receive(self, size: int, ancillary_size: int) -> tuple[bytes, list[tuple[int, int, bytes]]] | None:
        """The next packet with its ancillary data; None if the connection has ended."""
        try:
            packet, ancillary, _, _ = self._socket.recvmsg(size, ancillary_size, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            packet, ancillary = b"", []
        if packet:
            return packet, ancillary
        asyncio.get_running_loop().remove_reader(self._socket)
        self._on_lost("its init is gone")
        return None
