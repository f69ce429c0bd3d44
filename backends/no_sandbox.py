"""The backend of environments that need no sandbox: it starts nothing, and its slots run nothing."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from backends.base import BackendStats, Layer, Slot, Snapshot, ToolBackend
from backends.errors import ArtifactNotFoundError, SnapshotError
from backends.options import PoolOptions
from sandbox_image.protocol import ArtifactArchive, ArtifactContent, ArtifactListing, ExecutionResult

_REASON = "there is no sandbox"


class NoSandbox(ToolBackend):
    """Hands out as many slots as are asked for. A call in one is answered like a command that does not exist."""

    default_timeout_s = 1.0

    def __init__(self) -> None:
        super().__init__(PoolOptions())

    async def start(self) -> None:
        """There is nothing to bring up."""

    async def stop(self, *, purge: bool = False) -> None:
        """There is nothing to give back."""

    async def acquire(
        self,
        trajectory_id: str,
        *,
        layer: Layer | None = None,
        start_from: Snapshot | None = None,
        network: bool | None = None,
        memory_bytes: int | None = None,
    ) -> Slot:
        """A slot at once; a layer is not built, and there is nothing to be limited."""
        return Slot(sandbox_id="none", slot_id="none", trajectory_id=trajectory_id, lease="none")

    async def release(self, slot: Slot, *, reset_workspace: bool = True) -> None:
        """Nobody else waits for it."""

    async def reset(
        self,
        slot: Slot,
        *,
        layer: Layer | None = None,
        start_from: Snapshot | None = None,
        network: bool | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """It is as fresh as ever."""

    async def snapshot(self, slot: Slot) -> NoReturn:
        """Raises `SnapshotError`: there are no files."""
        raise SnapshotError(_REASON)

    async def discard(self, snapshot: Snapshot) -> None:
        """There is none."""

    async def execute(self, slot: Slot, tool: str, args: dict[str, Any], *, timeout_s: float | None = None) -> ExecutionResult:
        """A result that says that nothing was run; raises nothing."""
        return ExecutionResult(success=False, output="", error=_REASON)

    async def read_artifact(
        self,
        slot: Slot,
        path: str,
        *,
        encoding: Literal["text", "base64"] = "text",
        max_bytes: int | None = None,
        include_sha256: bool = False,
    ) -> ArtifactContent:
        """Raises `ArtifactNotFoundError`: there are no files."""
        raise ArtifactNotFoundError(_REASON)

    async def list_artifacts(
        self, slot: Slot, path: str = ".", *, recursive: bool = False, max_entries: int | None = None
    ) -> ArtifactListing:
        """Raises `ArtifactNotFoundError`: there are no files."""
        raise ArtifactNotFoundError(_REASON)

    async def archive_artifacts(
        self, slot: Slot, path: str = ".", *, max_bytes: int | None = None, max_entries: int | None = None
    ) -> ArtifactArchive:
        """Raises `ArtifactNotFoundError`: there are no files."""
        raise ArtifactNotFoundError(_REASON)

    def get_stats(self) -> BackendStats:
        """Nothing is in use."""
        return BackendStats(sandboxes=0, slots=0, slots_in_use=0, waiting=0, sandbox_restarts=0)
