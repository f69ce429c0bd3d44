"""A slot as the environments see it: files and commands."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field

from backends.base import Layer, Slot, Snapshot, ToolBackend
from sandbox_image.protocol import MAX_ARTIFACT_BYTES, WORKSPACE, ExecutionResult


@dataclass
class Workspace:
    """Runs commands and moves files in one slot. `cwd` and `env` are what the agent's tools work with."""

    backend: ToolBackend
    slot: Slot
    cwd: str = WORKSPACE
    env: dict[str, str] = field(default_factory=dict)

    async def run(
        self, command: str, *, cwd: str = WORKSPACE, env: Mapping[str, str] | None = None, timeout_s: float | None = None
    ) -> ExecutionResult:
        """Run a command; a failing one is a result, a failing sandbox raises `SandboxError`."""
        arguments = {"command": command, "cwd": cwd, "env": dict(env or {})}
        return await self.backend.execute(self.slot, "bash", arguments, timeout_s=timeout_s)

    async def write(self, path: str, content: bytes) -> ExecutionResult:
        """Write a file. A path that cannot be written, or a full disk, is a result."""
        arguments = {"path": path, "content": base64.b64encode(content).decode("ascii"), "encoding": "base64"}
        return await self.backend.execute(self.slot, "write_file", arguments)

    async def read(self, path: str, *, max_bytes: int = MAX_ARTIFACT_BYTES) -> bytes:
        """Read a regular file whole. Raises `ArtifactError` if that is not possible."""
        content = await self.backend.read_artifact(self.slot, path, encoding="base64", max_bytes=max_bytes)
        return base64.b64decode(content.content)

    async def reset(self, layer: Layer | None = None, *, start_from: Snapshot | None = None) -> None:
        """Kill everything in the slot and start again from the layer or the snapshot."""
        await self.backend.reset(self.slot, layer=layer, start_from=start_from)

    async def reset_for_grading(self, layer: Layer | None) -> None:
        """Kill everything in the slot and start again from the layer, without network whatever the agent had."""
        await self.backend.reset(self.slot, layer=layer, network=False)

    async def snapshot(self) -> Snapshot:
        """Keep a copy of the files, from which other slots of the sandbox can start, until it is discarded."""
        return await self.backend.snapshot(self.slot)


def explain(result: ExecutionResult) -> str:
    """Why a command failed, in one line: what the server says of it, and the last thing that it said itself."""
    said = result.output.strip().splitlines()
    return ": ".join([part for part in (result.error, said[-1][:500] if said else None) if part]) or "no reason was given"
