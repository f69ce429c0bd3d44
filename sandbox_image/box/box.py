"""The box of a slot: a sandbox that starts once, with our init inside, and runs one command after the other."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sandbox_image.box.blueprint import Blueprint, SlotDirectory
from sandbox_image.box.channel import InitChannel, Reply
from sandbox_image.box.defences import Defence, check_required, inspect, read_limits
from sandbox_image.box.network import PORT, BoxProxy, NetworkPolicy
from sandbox_image.errors import BoxError, ToolError
from sandbox_image.kernel import linux
from sandbox_image.kernel.cgroups import SlotGroup

START_TIMEOUT_S = 30.0
KILL_MARGIN_S = 4.0
"""An init that is to kill a command whose time is over, and does nothing for so long, is given up."""
MAX_KILL_S = 12.0
"""How long it may take where processors are scarce and processes many: less than clients wait beyond a call's timeout."""
_PIPE_READ = 65536


@dataclass
class _Call:
    number: bytes
    sink: Callable[[bytearray], None]
    expired: bool = False


@dataclass(frozen=True)
class CommandEnd:
    """How a command ended: an exit status (128 + N for signal N; None if its time ran out) or why it never began."""

    exit_code: int | None
    expired: bool = False
    error: str | None = None


class KeptCommand:
    """A command that runs beside those of the calls until it ends or is killed."""

    def __init__(self, channel: InitChannel, number: bytes) -> None:
        self._channel = channel
        self._number = number
        self.ended = channel.exit_of(number)
        """Its exit status (128 + N for signal N), set when it and all that it started are dead; `BoxError` if the box died."""

    def interrupt(self) -> None:
        """SIGINT to its process group.

        Raises:
            BoxError: the box died.
        """
        self._channel.order(b"interrupt", self._number)

    def kill(self) -> None:
        """Kill it and all that it started, without waiting for it.

        Raises:
            BoxError: the box died.
        """
        self._channel.order(b"kill", self._number)


@dataclass
class Box:
    """A running sandbox. Belongs to the event loop's thread, to which bubblewrap's life is tied."""

    _process: subprocess.Popen[bytes]
    _channel: InitChannel
    _output: int
    _complaints: int
    _exit_fd: int
    _exited: asyncio.Future[None]
    _contained: bool
    _group: SlotGroup
    defences: dict[str, Defence] = field(default_factory=dict)
    """What was found when it started."""
    used: bool = False
    """Whether a command has been started in it."""
    _proxy: BoxProxy | None = None
    _init: int = 0
    _init_fd: int | None = None
    _call: _Call | None = None
    _verdict: str | None = None
    _closed: bool = False
    _buffer: bytearray = field(default_factory=lambda: bytearray(_PIPE_READ))
    _dying: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def start(cls, blueprint: Blueprint, place: SlotDirectory, *, network: bool = False) -> Box:
        """Start a box around a workspace and make sure that it is one.

        Raises:
            BoxError: it does not start, or a defence is missing. Nothing is left running then.
        """
        box = cls._spawn(blueprint, place, network)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                init, facts = await asyncio.shield(box._channel.hello)
                await box._take_charge(init)
            box._check(blueprint, place, init, facts)
            if network and box._contained:
                await box._open_network(blueprint.policy)
        except TimeoutError:
            await box.kill("it did not start in time")
            raise BoxError(f"no box after {START_TIMEOUT_S:.0f} s") from None
        except BoxError:
            await asyncio.shield(box.kill("it failed its check"))
            raise
        except asyncio.CancelledError:
            await asyncio.shield(box._abandon())
            raise
        return box

    async def _abandon(self) -> None:
        """Kill a box that is still starting.

        A bubblewrap that is killed while it makes namespaces can leave a child behind that waits for it for ever. Once there is
        an init, that can be killed with all that is in the box.
        """
        with suppress(TimeoutError, BoxError):
            async with asyncio.timeout(START_TIMEOUT_S):
                init, _ = await asyncio.shield(self._channel.hello)
            if self._init_fd is None:
                self._init_fd = os.pidfd_open(init)
        await self.kill("its start was cancelled")

    @classmethod
    def _spawn(cls, blueprint: Blueprint, place: SlotDirectory, network: bool) -> Box:
        loop = asyncio.get_running_loop()
        # What it calls belongs to the box, which is not there yet; nothing comes before the event loop runs again.
        channel = InitChannel(on_reply=lambda: box._drain(), on_lost=lambda reason: box._lost(reason))
        output, their_output = os.pipe()
        complaints = os.memfd_create("complaints")
        seccomp_filter = _filter_file(blueprint)
        theirs = [their_output, *([] if seccomp_filter is None else [seccomp_filter])]
        try:
            os.set_blocking(output, False)
            if place.uid is not None:
                # The right to open /dev/stdout and /dev/stderr is that to the pipe's inode, which would be ours alone.
                os.fchown(their_output, place.uid, place.uid)
            process = subprocess.Popen(
                blueprint.argv(place, control=channel.their_end, output=their_output, seccomp_filter=seccomp_filter),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=[channel.their_end, *theirs],
                cwd="/" if blueprint.isolation == "bubblewrap" else place.seen_as,
                env=blueprint.environment(place, network=network),
                start_new_session=True,
            )
        except OSError as error:
            channel.close()
            os.close(output)
            os.close(complaints)
            raise BoxError(f"cannot start a box: {error}") from error
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        contained = blueprint.isolation != "none"
        exit_fd = os.pidfd_open(process.pid)
        box = cls(process, channel, output, complaints, exit_fd, loop.create_future(), contained, place.group)
        channel.open()
        loop.add_reader(output, box._on_output)
        loop.add_reader(exit_fd, box._on_exit)
        return box

    async def _take_charge(self, init: int) -> None:
        """Put the init under the limits of its slot, before it has started anything."""
        try:
            self._init, self._init_fd = init, os.pidfd_open(init)
            # With a thousand processes beside it, it would have to wait for many seconds until it can kill them.
            linux.schedule_first(init)
            # The kernel may let whoever moves a process wait for all processors, for 10 ms and more.
            await asyncio.to_thread(self._group.add, init)
        except OSError as error:
            raise BoxError(f"it cannot be limited: {error}") from error

    def _check(self, blueprint: Blueprint, place: SlotDirectory, init: int, facts: dict[str, str]) -> None:
        """Look for the defences of a box that has just started, before it gets a command."""
        try:
            limits = read_limits(init)
        except OSError as error:
            raise BoxError(f"its limits cannot be read: {error.strerror}") from error
        self.defences = inspect(blueprint, place, facts, limits)
        check_required(self.defences, blueprint.required)

    async def _open_network(self, policy: NetworkPolicy) -> None:
        """Serve the proxy that is its way out, before it gets a command that could take its port."""
        try:
            listening = await self.listen(PORT)
        except ToolError as error:
            raise BoxError(f"cannot listen in it: {error}") from error
        self._proxy = BoxProxy(policy)
        await self._proxy.serve(listening)

    @property
    def alive(self) -> bool:
        """Whether it can run a command."""
        return self._verdict is None and not self._closed

    def still_runs(self) -> bool:
        """Whether it is alive at this moment, even if the event loop has not heard of its end yet."""
        if not self.alive or self._init_fd is None:
            return False
        end = select.poll()
        end.register(self._init_fd, select.POLLIN)
        return not end.poll(0)

    @property
    def verdict(self) -> str:
        """Why it is not alive any more."""
        return self._verdict or "it is closed"

    async def run(
        self,
        command: bytes,
        sink: Callable[[bytearray], None],
        timeout_s: float,
        *,
        cwd: bytes = b"",
        variables: Sequence[bytes] = (),
    ) -> CommandEnd:
        """Run a command with `/bin/sh -c`; when this returns, everything that it started is dead.

        `sink` gets what is printed, as it comes, standard output and error in one stream. `cwd` is relative to the workspace,
        `variables` (`NAME=value`) are added to the environment; none of it holds a NUL. One command at a time.

        Raises:
            BoxError: the box died, or had to be killed because it did not answer.
        """
        if not self.alive:
            raise BoxError(self.verdict)
        self.used = True
        loop = asyncio.get_running_loop()
        call = self._call = _Call(self._channel.new_number(), sink)
        try:
            answer = await self._channel.ask(b"run", call.number, cwd, *variables, command)
            timer = loop.call_later(timeout_s, self._expire, call)
            try:
                reply = await answer
            finally:
                timer.cancel()
        except BaseException:
            # Whatever interrupts the wait, a command that nobody waits for must not run on.
            self.doom("a call was abandoned")
            raise
        finally:
            self._call = None
        if reply.kind == b"error":
            return CommandEnd(None, error=reply.text.decode(errors="replace"))
        return CommandEnd(None, expired=True) if call.expired else CommandEnd(int(reply.text))

    async def keep(
        self, command: bytes, descriptors: Sequence[int], *, cwd: bytes = b"", variables: Sequence[bytes] = ()
    ) -> KeptCommand:
        """Start a command with `/bin/sh -c` that outlives calls, with these descriptors as its 0, 1, 2... and no others.

        The caller closes its own copies.

        Raises:
            ToolError: it cannot be started.
            BoxError: the box died.
        """
        self.used = True
        number = self._channel.new_number()
        kept = KeptCommand(self._channel, number)
        try:
            await self._ask(b"keep", number, cwd, *variables, command, descriptors=descriptors)
        except BaseException:
            self._channel.forget(number)
            raise
        return kept

    async def enter(self, path: str) -> None:
        """Take what is now mounted at a path of the box as the workspace; only between calls.

        Raises:
            ToolError: it is no directory, or cannot be written.
            BoxError: the box died.
        """
        await self._ask(b"enter", self._channel.new_number(), os.fsencode(path))

    async def listen(self, port: int) -> socket.socket:
        """A socket that listens on 127.0.0.1 in the box's network.

        Raises:
            ToolError: the port is taken.
            BoxError: the box died.
        """
        reply = await self._ask(b"listen", self._channel.new_number(), b"%d" % port)
        if len(reply.descriptors) != 1:
            raise BoxError("its init sent no socket")
        return socket.socket(fileno=reply.descriptors[0])

    def doom(self, reason: str) -> None:
        """Kill all that is in the box, without waiting for it; the running call ends with `reason`."""
        if self._closed:
            return
        if self._verdict is None:
            self._verdict = reason
        self._channel.fail(BoxError(self._verdict))
        if not self._contained:
            # Without a namespace only the init knows what it started; it kills that and leaves when the socket closes.
            self._channel.shut_down()
            asyncio.get_running_loop().call_later(KILL_MARGIN_S, self._process.kill)
        elif self._init_fd is not None:
            try:
                signal.pidfd_send_signal(self._init_fd, signal.SIGKILL)
            except ProcessLookupError:
                return
        else:
            self._process.kill()

    async def kill(self, reason: str) -> None:
        """Kill all that is in the box; when this returns, it is gone.

        Raises:
            BoxError: it does not die.
        """
        self.doom(reason)
        # A reset and the end of the server may both wait for it, and a descriptor can have one reader.
        async with self._dying:
            if self._closed:
                return
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await asyncio.shield(self._exited)
                    # Readable once the init is a zombie, and PID 1 becomes one only after all others in its namespace are gone.
                    if self._init_fd is not None:
                        await _readable(self._init_fd)
            except TimeoutError:
                raise BoxError(f"a box does not die (process {self._process.pid})") from None
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._output)
        if self._proxy is not None:
            self._proxy.close()
        self._channel.close()
        for descriptor in (self._output, self._complaints, self._exit_fd, self._init_fd):
            if descriptor is not None:
                os.close(descriptor)

    async def _ask(self, kind: bytes, number: bytes, *parts: bytes, descriptors: Sequence[int] = ()) -> Reply:
        """Give the init an order that it follows at once.

        Raises:
            ToolError: it cannot.
            BoxError: the box died.
        """
        if not self.alive:
            raise BoxError(self.verdict)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                reply = await (await self._channel.ask(kind, number, *parts, descriptors=descriptors))
        except TimeoutError:
            self.doom("its init did not answer")
            raise BoxError(self.verdict) from None
        if reply.kind == b"error":
            raise ToolError(reply.text.decode(errors="replace"))
        return reply

    def _expire(self, call: _Call) -> None:
        if call is not self._call:
            return
        call.expired = True
        try:
            self._channel.order(b"kill", call.number)
        except BoxError as error:
            self.doom(str(error))
            return
        self._await_kill(call, asyncio.get_running_loop().time() + MAX_KILL_S)

    def _await_kill(self, call: _Call, deadline: float, ran_s: float = -1.0) -> None:
        """Look from time to time whether the init, which has run for `ran_s`, is still at work."""
        if call is not self._call:
            return
        loop = asyncio.get_running_loop()
        try:
            now_s = linux.processor_time(self._init)
        except OSError:
            # Its end is about to be noticed.
            return
        if now_s == ran_s or loop.time() > deadline:
            self.doom("its init did not answer")
        else:
            loop.call_later(KILL_MARGIN_S, self._await_kill, call, deadline, now_s)

    def _drain(self) -> None:
        """Take what is in the pipe now: when a command's end is reported, all that it has printed is.

        Not what is added meanwhile: a kept command may have opened the pipe, and write for ever.
        """
        left = linux.bytes_in_pipe(self._output)
        while left > 0 and (size := self._on_output()):
            left -= size

    def _on_output(self) -> int:
        """Read once; how many bytes there were."""
        try:
            size = os.readv(self._output, (self._buffer,))
        except BlockingIOError:
            return 0
        if size == 0:
            asyncio.get_running_loop().remove_reader(self._output)
        elif self._call is not None:
            self._call.sink(self._buffer[:size])
        return size

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._exit_fd)
        status = self._process.wait()
        self._lost(f"it ended with status {status}")
        if not self._exited.done():
            self._exited.set_result(None)

    def _lost(self, reason: str) -> None:
        complaint = os.pread(self._complaints, 4096, 0).decode(errors="replace").strip()
        if complaint:
            reason = f"{reason}: {complaint.splitlines()[-1]}"
        self.doom(reason)


def _filter_file(blueprint: Blueprint) -> int | None:
    """A file with the seccomp filter. One for each box: those who share an open file share its position."""
    if blueprint.seccomp_filter is None:
        return None
    descriptor = os.memfd_create("seccomp")
    os.pwrite(descriptor, blueprint.seccomp_filter, 0)
    return descriptor


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
