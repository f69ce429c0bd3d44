"""The box of a slot: a sandbox that starts once, with our init as its PID 1, and runs one command after the other."""

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
from sandbox_image.box.commands import CommandEnd, KeptCommand, RunningCommand
from sandbox_image.box.defences import Defence, check_required, inspect, read_limits
from sandbox_image.box.network import NetworkPolicy
from sandbox_image.box.proxy import PORT, BoxProxy
from sandbox_image.errors import BoxError, ToolError
from sandbox_image.kernel import linux
from sandbox_image.kernel.cgroups import SlotGroup

START_TIMEOUT_S = 30.0
KILL_MARGIN_S = 3.0
"""An init that is to kill a command whose time is over, and does nothing for so long, is given up."""
MAX_KILL_S = 12.0
"""How long it may take where processors are scarce and processes many: less than clients wait beyond a call's timeout."""
_PIPE_READ = 65536


@dataclass
class Box:
    """A running sandbox. Must be started by the event loop's thread: bubblewrap dies with the thread that started it."""

    _process: subprocess.Popen[bytes]
    _channel: InitChannel
    _output: int
    _complaints: int
    _exit_fd: int
    _exited: asyncio.Future[None]
    _contained: bool
    _group: SlotGroup
    defences: dict[str, Defence] = field(default_factory=dict)
    """The state of each defence when it started."""
    used: bool = False
    """Whether a command has been started in it."""
    _proxy: BoxProxy | None = None
    _init: int = 0
    _init_fd: int | None = None
    _running: RunningCommand | None = None
    _verdict: str | None = None
    _closed: bool = False
    _buffer: bytearray = field(default_factory=lambda: bytearray(_PIPE_READ))
    _dying: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def start(cls, blueprint: Blueprint, directory: SlotDirectory, *, network: bool = False) -> Box:
        """Start a box around the workspace of a slot directory, and check its defences.

        Raises:
            BoxError: it does not start, or a required defence is missing. Nothing is left running then.
        """
        box = cls._spawn(blueprint, directory, network)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                init, facts = await asyncio.shield(box._channel.hello)
                await box._take_charge(init)
            box._check(blueprint, directory, init, facts)
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
        """Kill a box that is still starting, once its init is there.

        Killed while it makes namespaces, bubblewrap can leave a child behind that waits for it for ever. The death of the init
        ends all processes of its PID namespace.
        """
        with suppress(TimeoutError, BoxError):
            async with asyncio.timeout(START_TIMEOUT_S):
                init, _ = await asyncio.shield(self._channel.hello)
            if self._init_fd is None:
                self._init_fd = os.pidfd_open(init)
        await self.kill("its start was cancelled")

    @classmethod
    def _spawn(cls, blueprint: Blueprint, directory: SlotDirectory, network: bool) -> Box:
        loop = asyncio.get_running_loop()
        # The callbacks refer to the box, which is made below: they are not called before the event loop runs again.
        channel = InitChannel(on_reply=lambda: box._drain(), on_lost=lambda reason: box._lost(reason))
        output, their_output = os.pipe()
        complaints = os.memfd_create("complaints")
        seccomp_filter = _filter_file(blueprint)
        theirs = [their_output, *([] if seccomp_filter is None else [seccomp_filter])]
        try:
            os.set_blocking(output, False)
            if directory.uid is not None:
                # Opening /dev/stdout or /dev/stderr needs permission for the pipe's inode, which belongs to the server.
                os.fchown(their_output, directory.uid, directory.uid)
            process = subprocess.Popen(
                blueprint.argv(directory, control=channel.their_end, output=their_output, seccomp_filter=seccomp_filter),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=[channel.their_end, *theirs],
                cwd="/" if blueprint.isolation == "bubblewrap" else directory.seen_as,
                env=blueprint.environment(directory, network=network),
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
        box = cls(process, channel, output, complaints, exit_fd, loop.create_future(), contained, directory.group)
        channel.open()
        loop.add_reader(output, box._on_output)
        loop.add_reader(exit_fd, box._on_exit)
        return box

    async def _take_charge(self, init: int) -> None:
        """Put the init into the control groups of its slot, before it has started a process."""
        try:
            self._init, self._init_fd = init, os.pidfd_open(init)
            # Among a thousand processes it would wait for seconds to be scheduled when it has to kill them.
            linux.schedule_first(init)
            # Moving a process may wait for an RCU grace period, 10 ms and more.
            await asyncio.to_thread(self._group.add, init)
        except OSError as error:
            raise BoxError(f"it cannot be limited: {error}") from error

    def _check(self, blueprint: Blueprint, directory: SlotDirectory, init: int, facts: dict[str, str]) -> None:
        """Check the defences, before the first command."""
        try:
            limits = read_limits(init)
        except OSError as error:
            raise BoxError(f"its limits cannot be read: {error.strerror}") from error
        self.defences = inspect(blueprint, directory, facts, limits)
        check_required(self.defences, blueprint.required)

    async def _open_network(self, policy: NetworkPolicy) -> None:
        """Start the proxy for the box, before the first command, which could take its port."""
        try:
            listening = await self.listen(PORT)
        except ToolError as error:
            raise BoxError(f"cannot listen in it: {error}") from error
        self._proxy = BoxProxy(policy)
        await self._proxy.serve(listening)

    @property
    def alive(self) -> bool:
        """Whether it can run commands."""
        return self._verdict is None and not self._closed

    def still_runs(self) -> bool:
        """Whether it is alive at this moment; `alive` may not have been updated yet."""
        if not self.alive or self._init_fd is None:
            return False
        end = select.poll()
        end.register(self._init_fd, select.POLLIN)
        return not end.poll(0)

    @property
    def verdict(self) -> str:
        """The reason why it is not alive any more."""
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
        """Run a command with `/bin/sh -c`; when this returns, all processes that it started are dead.

        `sink` takes the output as it comes, standard output and error in one stream. `cwd` is relative to the workspace,
        `variables` (`NAME=value`) are added to the environment. No argument contains a NUL. One command at a time.

        Raises:
            BoxError: the box died, or was killed because its init did not answer.
        """
        if not self.alive:
            raise BoxError(self.verdict)
        self.used = True
        loop = asyncio.get_running_loop()
        running = self._running = RunningCommand(self._channel.new_number(), sink)
        try:
            answer = await self._channel.ask(b"run", running.number, cwd, *variables, command)
            timer = loop.call_later(timeout_s, self._expire, running)
            try:
                reply = await answer
            finally:
                timer.cancel()
        except BaseException:
            # Cancelled, for example: a command that nobody waits for must not go on.
            self.doom("a call was abandoned")
            raise
        finally:
            self._running = None
        if reply.kind == b"error":
            return CommandEnd(None, error=reply.text.decode(errors="replace"))
        return CommandEnd(None, expired=True) if running.expired else CommandEnd(int(reply.text))

    async def keep(
        self, command: bytes, descriptors: Sequence[int], *, cwd: bytes = b"", variables: Sequence[bytes] = ()
    ) -> KeptCommand:
        """Start a command with `/bin/sh -c` that outlives calls, with these descriptors as its 0, 1, 2... and no others.

        The caller keeps its own copies of them.

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
        """Use the directory that is now mounted at a path of the box as the workspace; only between calls.

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
        """Kill all processes of the box, without waiting for their end; the running call fails with `reason`."""
        if self._closed:
            return
        if self._verdict is None:
            self._verdict = reason
        self._channel.fail(BoxError(self._verdict))
        if not self._contained:
            # Without a PID namespace only the init knows its descendants; it kills them and ends when the socket closes.
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
        """Kill all processes of the box; when this returns, they are gone.

        Raises:
            BoxError: they do not die.
        """
        self.doom(reason)
        # A reset and the end of the server may wait at the same time, and a descriptor can have one reader.
        async with self._dying:
            if self._closed:
                return
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await asyncio.shield(self._exited)
                    # Readable when PID 1 is a zombie, which it becomes after all other processes of its namespace are gone.
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
        """Send the init an order that it carries out at once.

        Raises:
            ToolError: it cannot be carried out.
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

    def _expire(self, running: RunningCommand) -> None:
        if running is not self._running:
            return
        running.expired = True
        try:
            self._channel.order(b"kill", running.number)
        except BoxError as error:
            self.doom(str(error))
            return
        self._await_kill(running, asyncio.get_running_loop().time() + MAX_KILL_S)

    def _await_kill(self, running: RunningCommand, deadline: float, used_s: float = -1.0) -> None:
        """Give the init up at the deadline, or when it has used no processor time since it had used `used_s`."""
        if running is not self._running:
            return
        loop = asyncio.get_running_loop()
        try:
            now_s = linux.processor_time(self._init)
        except OSError:
            # Its end is about to be noticed.
            return
        if now_s == used_s or loop.time() > deadline:
            self.doom("its init did not answer")
        else:
            loop.call_later(KILL_MARGIN_S, self._await_kill, running, deadline, now_s)

    def _drain(self) -> None:
        """Read what the pipe contains now: all output of a command is there when its end is reported.

        Output that is added meanwhile is left: a kept command may have opened the pipe, and write without end.
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
        elif self._running is not None:
            self._running.sink(self._buffer[:size])
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
    """A file with the seccomp filter, for one box: descriptors of one open file share the position."""
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
