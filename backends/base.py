"""The contract of every backend: where slots come from and what can be done with one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from backends.options import PoolOptions
from backends.teardown import finish
from sandbox_image.protocol import ArtifactArchive, ArtifactContent, ArtifactListing, ExecutionResult


@dataclass
class Slot:
    """A slot that belongs to one trajectory until it is released.

    `lease` changes with every reset; calls carry it, so that a slot whose workspace was lost is noticed and never used on.
    """

    sandbox_id: str
    slot_id: str
    trajectory_id: str
    lease: str


@dataclass(frozen=True)
class Layer:
    """A named state of a workspace to start from: `build` runs once per sandbox, in a slot with network; the result is frozen.

    The slot in which it is built starts from `base`, if there is one. `build` raises to report that the layer cannot be built;
    nothing is kept then, and whoever asked gets the exception.
    """

    name: str
    build: Callable[[Slot], Awaitable[None]]
    base: Layer | None = None


@dataclass(frozen=True)
class Snapshot:
    """The files of a slot as they were at a moment, kept in its sandbox until they are discarded."""

    sandbox_id: str
    name: str


@dataclass(frozen=True)
class BackendStats:
    """A moment of a backend: counts of sandboxes and slots, and of what went wrong since the start."""

    sandboxes: int
    slots: int
    slots_in_use: int
    waiting: int
    sandbox_restarts: int


class ToolBackend(ABC):
    """Gets slots from somewhere and runs tools in them.

    Owned by `async with`: entering starts it, leaving stops it. All methods may be called concurrently.
    """

    options_class: ClassVar[type[PoolOptions]] = PoolOptions
    """What a backend that is chosen by name is made from; fields of its own have a prefix of its own."""

    default_timeout_s: float

    def __init__(self, options: PoolOptions) -> None:
        """`options` is an instance of `options_class`. Nothing is started; the event loop need not run."""
        self.options = options

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            # Nobody calls `__aexit__` for a block that was never entered.
            await finish(self.stop(purge=True))
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await finish(self.stop(purge=True))

    @abstractmethod
    async def start(self) -> None:
        """Bring up what is needed to hand out slots.

        Raises:
            BackendConfigError: it can never work on this machine with these options.
            SandboxUnavailableError: the first sandbox did not come up.
        """

    @abstractmethod
    async def stop(self, *, purge: bool = False) -> None:
        """Give everything back; `purge` also removes what could serve a later start. May be called twice."""

    @abstractmethod
    async def acquire(
        self,
        trajectory_id: str,
        *,
        layer: Layer | None = None,
        start_from: Snapshot | None = None,
        network: bool | None = None,
        memory_bytes: int | None = None,
    ) -> Slot:
        """Wait for a free slot with a fresh workspace, that starts from `layer` or `start_from` if there is one.

        A slot that starts from a snapshot is one of the sandbox that has it. `network` says whether the slot reaches the
        network, `memory_bytes` lowers its memory limit (a higher one than configured changes nothing); None is as configured.

        Raises:
            BackendConfigError: `network` is true and `allow_network` is not, or no slot can work with `memory_bytes`.
            SnapshotError: the snapshot is gone.
            AcquireTimeoutError: none became free within `acquire_timeout_s`.
            SandboxUnavailableError: there is no sandbox, and none could be started.
            Exception: whatever `layer.build` raised.
        """

    @abstractmethod
    async def release(self, slot: Slot, *, reset_workspace: bool = True) -> None:
        """Give a slot back. Never raises for a slot that is already lost; releasing twice is harmless.

        Without `reset_workspace` the files stay until somebody else gets the slot: whoever acquires has a fresh one anyway.
        """

    @abstractmethod
    async def reset(
        self,
        slot: Slot,
        *,
        layer: Layer | None = None,
        start_from: Snapshot | None = None,
        network: bool | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Kill everything in the slot and give it a new box and workspace; `slot.lease` is renewed in place.

        `network` and `memory_bytes` are as for `acquire`; None is what `acquire` was told for this slot.

        Raises:
            BackendConfigError: as for `acquire`.
            SnapshotError: the snapshot is gone, or in another sandbox than the slot.
            SlotLostError, SandboxUnavailableError: as for `execute`.
            Exception: whatever `layer.build` raised.
        """

    @abstractmethod
    async def snapshot(self, slot: Slot) -> Snapshot:
        """Keep a copy of the slot's files, to start other slots of its sandbox from; the slot goes on.

        Waits for the calls that run in the slot. What runs there beside calls may be caught half-way through a file.

        Raises:
            SnapshotError: there is no room for it.
            SlotLostError, SandboxUnavailableError: as for `execute`.
        """

    @abstractmethod
    async def discard(self, snapshot: Snapshot) -> None:
        """Delete a snapshot. Slots that started from it go on. Never raises for one that is gone."""

    @abstractmethod
    async def execute(self, slot: Slot, tool: str, args: dict[str, Any], *, timeout_s: float | None = None) -> ExecutionResult:
        """Run one tool. The call leaves at once if it can; calls that pile up for a sandbox travel together.

        Raises:
            SlotLostError: the workspace is gone. The command may or may not have run.
            ExecutionTimeoutError: no answer within `timeout_s` plus a margin.
            SandboxUnavailableError: the sandbox does not answer.
            SandboxProtocolError: the answer is not the protocol, or the request was malformed.
        """

    async def execute_batch(
        self, calls: Sequence[tuple[Slot, str, dict[str, Any]]], *, timeout_s: float | None = None
    ) -> list[ExecutionResult]:
        """Run several tools concurrently; results are in request order.

        Raises:
            SandboxError: the first failure, as `execute` raises it; the other calls are cancelled and done by then.
        """
        tasks = [asyncio.ensure_future(self.execute(slot, tool, args, timeout_s=timeout_s)) for slot, tool, args in calls]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await finish(asyncio.gather(*tasks, return_exceptions=True))
            raise

    @abstractmethod
    async def read_artifact(
        self,
        slot: Slot,
        path: str,
        *,
        encoding: Literal["text", "base64"] = "text",
        max_bytes: int | None = None,
        include_sha256: bool = False,
    ) -> ArtifactContent:
        """Read one file of the workspace.

        Raises:
            ArtifactNotFoundError, ArtifactForbiddenError, ArtifactTooLargeError: the path's fault.
            SandboxError: as for `execute`.
        """

    @abstractmethod
    async def list_artifacts(
        self, slot: Slot, path: str = ".", *, recursive: bool = False, max_entries: int | None = None
    ) -> ArtifactListing:
        """List a directory of the workspace. Raises as `read_artifact`."""

    @abstractmethod
    async def archive_artifacts(
        self, slot: Slot, path: str = ".", *, max_bytes: int | None = None, max_entries: int | None = None
    ) -> ArtifactArchive:
        """Pack a directory of the workspace. Raises as `read_artifact`."""

    @abstractmethod
    def get_stats(self) -> BackendStats:
        """Counts for logs and metrics."""

    @asynccontextmanager
    async def slot(
        self,
        trajectory_id: str,
        *,
        layer: Layer | None = None,
        start_from: Snapshot | None = None,
        network: bool | None = None,
        memory_bytes: int | None = None,
    ) -> AsyncIterator[Slot]:
        """Hold a slot for the length of a block; it comes back on success, failure, timeout and cancellation.

        The arguments are those of `acquire`.
        """
        slot = await self.acquire(trajectory_id, layer=layer, start_from=start_from, network=network, memory_bytes=memory_bytes)
        try:
            yield slot
        finally:
            await finish(self.release(slot))
