"""What all backends share that get their slots from slot servers: everything but where the servers come from."""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any, Literal

from backends.base import BackendStats, Layer, Slot, Snapshot, ToolBackend
from backends.client import SlotServerClient
from backends.codec import MissingError
from backends.dispatch import Dispatcher
from backends.errors import BackendConfigError, SandboxUnavailableError
from backends.options import PoolOptions
from backends.pool import SlotLimits, SlotPool
from backends.sandbox import Sandbox
from sandbox_image.protocol import (
    DEFAULT_ARTIFACT_BYTES,
    DEFAULT_ARTIFACT_ENTRIES,
    DEFAULT_TIMEOUT_S,
    LEAST_MEMORY_BYTES,
    ArtifactArchive,
    ArtifactArchiveRequest,
    ArtifactContent,
    ArtifactListing,
    ArtifactListRequest,
    ArtifactReadRequest,
    DeleteLayerRequest,
    ExecuteRequest,
    ExecutionResult,
    FreezeRequest,
)


class PooledBackend(ToolBackend):
    """A backend with a `SlotPool`. A subclass starts and ends sandboxes, and tells the pool of them (docs/new_backend.md)."""

    default_timeout_s = DEFAULT_TIMEOUT_S

    def __init__(self, options: PoolOptions) -> None:
        super().__init__(options)
        self._sandbox_restarts = 0
        self._pool: SlotPool | None = None

    def _on_demand(self) -> None:
        """Called when somebody has to wait for a slot; a backend that can start another sandbox overrides it."""

    def _new_pool(self) -> SlotPool:
        return SlotPool(
            acquire_timeout_s=self.options.acquire_timeout_s,
            network=self.options.allow_network,
            on_demand=self._on_demand,
        )

    def _new_sandbox(self, sandbox_id: str, client: SlotServerClient, slots: int) -> Sandbox:
        dispatcher = Dispatcher(
            client,
            window_s=self.options.tool_batch_window_ms / 1000,
            max_batch_size=self.options.tool_max_batch_size,
        )
        return Sandbox(sandbox_id, client, [f"slot_{number}" for number in range(slots)], dispatcher)

    def _sandbox_of(self, slot: Slot) -> Sandbox:
        return self._running_pool().sandbox_of(slot)

    def _running_pool(self) -> SlotPool:
        if self._pool is None:
            raise SandboxUnavailableError("the backend is not running")
        return self._pool

    def _limits(self, network: bool | None, memory_bytes: int | None) -> SlotLimits:
        if network and not self.options.allow_network:
            raise BackendConfigError("allow_network: a slot with network is asked for, and the option does not allow any")
        if memory_bytes is not None and memory_bytes < LEAST_MEMORY_BYTES:
            raise BackendConfigError(f"a slot with {memory_bytes} bytes of memory is asked for; it needs {LEAST_MEMORY_BYTES}")
        return SlotLimits(network, memory_bytes)

    async def acquire(
        self,
        trajectory_id: str,
        *,
        layer: Layer | None = None,
        start_from: Snapshot | None = None,
        network: bool | None = None,
        memory_bytes: int | None = None,
    ) -> Slot:
        """See `ToolBackend.acquire`."""
        limits = self._limits(network, memory_bytes)
        return await self._running_pool().acquire(trajectory_id, _start(layer, start_from), limits)

    async def release(self, slot: Slot, *, reset_workspace: bool = True) -> None:
        """See `ToolBackend.release`. The reset goes on in the background."""
        if self._pool is not None:
            self._pool.release(slot, reset_workspace=reset_workspace)

    async def reset(
        self,
        slot: Slot,
        *,
        layer: Layer | None = None,
        start_from: Snapshot | None = None,
        network: bool | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """See `ToolBackend.reset`."""
        limits = self._limits(network, memory_bytes)
        await self._running_pool().reset(slot, _start(layer, start_from), limits)

    async def snapshot(self, slot: Slot) -> Snapshot:
        """See `ToolBackend.snapshot`."""
        snapshot = Snapshot(slot.sandbox_id, f"snapshot-{uuid.uuid4().hex}")
        await self._sandbox_of(slot).client.freeze(FreezeRequest(slot.slot_id, snapshot.name, lease=slot.lease, snapshot=True))
        return snapshot

    async def discard(self, snapshot: Snapshot) -> None:
        """See `ToolBackend.discard`."""
        sandbox = None if self._pool is None else self._pool.sandbox(snapshot.sandbox_id)
        if sandbox is not None:
            with suppress(MissingError, SandboxUnavailableError):
                await sandbox.client.delete_layer(DeleteLayerRequest(snapshot.name))

    async def execute(self, slot: Slot, tool: str, args: dict[str, Any], *, timeout_s: float | None = None) -> ExecutionResult:
        """See `ToolBackend.execute`."""
        request = ExecuteRequest(
            slot_id=slot.slot_id,
            tool=tool,
            args=args,
            execution_id=uuid.uuid4().hex,
            timeout=self.default_timeout_s if timeout_s is None else timeout_s,
            lease=slot.lease,
        )
        return await self._sandbox_of(slot).dispatcher.submit(request)

    async def read_artifact(
        self,
        slot: Slot,
        path: str,
        *,
        encoding: Literal["text", "base64"] = "text",
        max_bytes: int | None = None,
        include_sha256: bool = False,
    ) -> ArtifactContent:
        """See `ToolBackend.read_artifact`."""
        limit = DEFAULT_ARTIFACT_BYTES if max_bytes is None else max_bytes
        request = ArtifactReadRequest(slot.slot_id, path, encoding, limit, include_sha256, slot.lease)
        return await self._sandbox_of(slot).client.read_artifact(request)

    async def list_artifacts(
        self, slot: Slot, path: str = ".", *, recursive: bool = False, max_entries: int | None = None
    ) -> ArtifactListing:
        """See `ToolBackend.list_artifacts`."""
        limit = DEFAULT_ARTIFACT_ENTRIES if max_entries is None else max_entries
        request = ArtifactListRequest(slot.slot_id, path, recursive, limit, slot.lease)
        return await self._sandbox_of(slot).client.list_artifacts(request)

    async def archive_artifacts(
        self, slot: Slot, path: str = ".", *, max_bytes: int | None = None, max_entries: int | None = None
    ) -> ArtifactArchive:
        """See `ToolBackend.archive_artifacts`."""
        request = ArtifactArchiveRequest(
            slot.slot_id,
            path,
            max_bytes=DEFAULT_ARTIFACT_BYTES if max_bytes is None else max_bytes,
            max_entries=DEFAULT_ARTIFACT_ENTRIES if max_entries is None else max_entries,
            lease=slot.lease,
        )
        return await self._sandbox_of(slot).client.archive_artifacts(request)

    def get_stats(self) -> BackendStats:
        """See `ToolBackend.get_stats`."""
        pool = self._pool
        if pool is None:
            return BackendStats(0, 0, 0, 0, self._sandbox_restarts)
        return BackendStats(pool.sandboxes, pool.slots, pool.in_use, pool.waiting, self._sandbox_restarts)


def _start(layer: Layer | None, start_from: Snapshot | None) -> Layer | Snapshot | None:
    if layer is not None and start_from is not None:
        raise ValueError("a workspace starts from a layer or from a snapshot, not from both")
    return layer if start_from is None else start_from
