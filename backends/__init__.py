"""Sandboxes: slots to run tools in, wherever they come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from backends.base import BackendStats, Layer, Slot, Snapshot, ToolBackend
from backends.errors import (
    AcquireTimeoutError,
    ArtifactError,
    ArtifactForbiddenError,
    ArtifactNotFoundError,
    ArtifactTooLargeError,
    BackendConfigError,
    ExecutionTimeoutError,
    SandboxError,
    SandboxProtocolError,
    SandboxUnavailableError,
    SlotLostError,
    SnapshotError,
)
from backends.local import LocalBackend, LocalOptions

__all__ = [
    "AcquireTimeoutError",
    "ArtifactError",
    "ArtifactForbiddenError",
    "ArtifactNotFoundError",
    "ArtifactTooLargeError",
    "BackendConfigError",
    "BackendOptions",
    "BackendStats",
    "ExecutionTimeoutError",
    "Layer",
    "LocalBackend",
    "LocalOptions",
    "SandboxError",
    "SandboxProtocolError",
    "SandboxUnavailableError",
    "Slot",
    "SlotLostError",
    "Snapshot",
    "SnapshotError",
    "ToolBackend",
    "create_tool_backend",
]


class BackendOptions(LocalOptions):
    """The options of all backends, of which `tool_pool_mode` chooses one."""

    tool_pool_mode: Literal["local", "docker", "nomad", "modal"] = Field("local", description="Where slots come from.")


def create_tool_backend(options: BackendOptions) -> ToolBackend:
    """The backend that `tool_pool_mode` names, not started yet.

    Raises:
        BackendConfigError: this version does not have it.
    """
    if options.tool_pool_mode == "local":
        return LocalBackend(options)
    raise BackendConfigError(f"tool_pool_mode: {options.tool_pool_mode!r} is not available in this version; available: local")
