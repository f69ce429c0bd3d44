"""What every backend can be told. A backend adds options of its own in a subclass beside it."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from sandbox_image.box.defences import REMEDIES
from sandbox_image.box.network import Destination
from sandbox_image.options import LEAST_PROCESSES
from sandbox_image.protocol import LEAST_MEMORY_BYTES, MAX_BATCH_ITEMS, WORKSPACE_BYTES, WORKSPACE_INODES


def _split_at_commas(value: object) -> object:
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts):
        return [name.strip() for part in parts for name in part.split(",") if name.strip()]
    return value


Names = Annotated[list[str], BeforeValidator(_split_at_commas)]
"""The type of an option that is a list in YAML, and names separated by commas, or JSON, in a flag or a variable."""


class PoolOptions(BaseModel):
    """What every pool of slots needs to know."""

    model_config = ConfigDict(extra="forbid")

    acquire_timeout_s: float = Field(300.0, gt=0, description="Longest wait for a free slot, in seconds.")
    allow_network: bool = Field(
        False, description="Whether the agent's slots reach the internet, by HTTP and HTTPS; layers are always built with it."
    )
    network_allowed_hosts: Names = Field(
        default_factory=list,
        description="`HOST` or `HOST:PORT` outside of the internet that slots with network reach, such as a package index.",
    )
    require_sandbox: bool = Field(True, description="Refuse to start without isolation.")
    workspace_bytes: int = Field(WORKSPACE_BYTES, ge=1, description="What a slot may write, beside what its layer holds.")
    workspace_inodes: int = Field(WORKSPACE_INODES, ge=100, description="How many files and directories it may make.")
    workspaces_on_disk: bool = Field(False, description="Keep workspaces on disk, without these limits, and not in memory.")
    layer_bytes: int | None = Field(
        None, ge=1, description="Room for layers in each sandbox; half of its free disk. Those used longest ago are deleted."
    )
    tool_batch_window_ms: float = Field(
        0.0, ge=0, description="How long a call waits for others to travel with; 0 sends it at once."
    )
    tool_max_batch_size: int = Field(200, ge=1, le=MAX_BATCH_ITEMS, description="Most calls that travel together.")
    slot_memory_bytes: int = Field(
        4 * 1024**3, ge=LEAST_MEMORY_BYTES, description="Memory of a slot; of each process where there are no control groups."
    )
    slot_processes: int = Field(1024, ge=LEAST_PROCESSES, description="Most processes of a slot, threads included.")
    required_defences: Names = Field(
        default_factory=list,
        description="Defences without which no sandbox starts, beside the basics of isolation; see `hermes-envs doctor`.",
    )

    @field_validator("network_allowed_hosts")
    @classmethod
    def _destinations(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            Destination.parse(host)
        return hosts

    @field_validator("required_defences")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in REMEDIES]
        if unknown:
            raise ValueError(f"there is no defence {unknown[0]!r}; there are {', '.join(REMEDIES)}")
        return names

    def server_arguments(self) -> list[str]:
        """What these options mean on the command line of a slot server."""
        arguments = ["--memory-bytes", str(self.slot_memory_bytes), "--processes", str(self.slot_processes)]
        arguments += ["--workspace-bytes", str(self.workspace_bytes), "--workspace-inodes", str(self.workspace_inodes)]
        if self.workspaces_on_disk:
            arguments.append("--workspaces-on-disk")
        if self.layer_bytes is not None:
            arguments += ["--layer-bytes", str(self.layer_bytes)]
        for host in self.network_allowed_hosts:
            arguments += ["--network-allow", host]
        for name in self.required_defences:
            arguments += ["--require", name]
        return arguments
