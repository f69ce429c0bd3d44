"""The pool of slots over HTTP, so that another process can use it: a slot for each trajectory, and the tools of a model in it.

    TOOL_EXECUTOR_TOKEN=secret python -m hermes_envs.tool_executor_server --port 9001 --local-slots 8

    POST /execute            {"trajectory_id", "tool", "args", "timeout"?} -> {"success", "output", "error", "metadata"}
    POST /release            {"trajectory_id", "reset_workspace"?} -> {"released"}
    POST /artifacts/read     {"trajectory_id", "path", "encoding"?, "max_bytes"?, "include_sha256"?} -> content
    POST /artifacts/list     {"trajectory_id", "path"?, "recursive"?, "max_entries"?} -> entries
    POST /artifacts/archive  {"trajectory_id", "path"?, "format"?, "max_bytes"?, "max_entries"?} -> archive
    GET  /status             -> counts of trajectories, calls and slots
    GET  /health             -> {"status"}

A trajectory gets its slot at its first call, and keeps it until it is released or was idle for too long. Every option is also
a variable, `TOOL_EXECUTOR_*`. When it listens it prints `{"ready": true, "port": P}`. It stops on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from backends import BackendOptions, ToolBackend, create_tool_backend, options_with
from backends.base import Slot
from backends.errors import SandboxError
from hermes_envs.errors import HermesEnvsError
from hermes_envs.services.http_service import (
    Body,
    HttpService,
    RefusalError,
    announce,
    get,
    post,
    result_json,
    stop_signal,
    unusable_json,
)
from hermes_envs.services.options import ServiceOptions
from hermes_envs.services.trajectory_slots import TrajectorySlots
from hermes_envs.tools.call import ToolCall, UnusableCallError
from hermes_envs.tools.executor import ToolExecutor, ToolOptions
from hermes_envs.tools.tool_server_client import ToolServerOptions, external_tools
from hermes_envs.tools.toolsets import Names, Toolsets
from hermes_envs.workspace import Workspace
from sandbox_image.protocol import (
    DEFAULT_ARTIFACT_BYTES,
    DEFAULT_ARTIFACT_ENTRIES,
    MAX_TIMEOUT_S,
    ExecutionResult,
)

ALIASES = {
    "TOOL_EXECUTOR_SLOTS": "TOOL_EXECUTOR_LOCAL_SLOTS",
    "TOOL_EXECUTOR_BATCH_WINDOW_MS": "TOOL_EXECUTOR_TOOL_BATCH_WINDOW_MS",
    "TOOL_EXECUTOR_MAX_BATCH_SIZE": "TOOL_EXECUTOR_TOOL_MAX_BATCH_SIZE",
}
MAX_TRAJECTORY_ID_CHARS = 256


class ToolExecutorServerOptions(ServiceOptions, BackendOptions, ToolOptions, ToolServerOptions):
    """Options of the tool executor server."""

    model_config = SettingsConfigDict(env_prefix="TOOL_EXECUTOR_")

    port: int = Field(9001, ge=0, le=65535, description="Port to listen at; 0 for a free one.")
    idle_timeout_s: float = Field(900.0, gt=0, description="How long a trajectory keeps its slot without a call, in seconds.")
    enabled_toolsets: Names = Field(["full", "bash", "bash_stateful"], description="Toolsets that can be called.")
    disabled_toolsets: Names = Field([], description="Toolsets whose tools are taken away again.")


def _check_trajectory_id(name: str) -> str:
    if not 1 <= len(name) <= MAX_TRAJECTORY_ID_CHARS or not name.isprintable():
        # It stands in lines of a log.
        raise ValueError(f"must have 1 to {MAX_TRAJECTORY_ID_CHARS} printable characters")
    return name


class TrajectoryBody(Body):
    """A request about one trajectory."""

    trajectory_id: Annotated[str, AfterValidator(_check_trajectory_id)]


class ExecuteBody(TrajectoryBody):
    """Run a tool. `timeout` is in seconds."""

    tool: str
    args: dict[str, Any]
    timeout: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S)


class ReleaseBody(TrajectoryBody):
    """Give the slot back. Without `reset_workspace` it is reset only when it is acquired again."""

    reset_workspace: bool = True


class ReadBody(TrajectoryBody):
    """Read one file of the workspace."""

    path: str
    encoding: Literal["text", "base64"] = "text"
    max_bytes: int = DEFAULT_ARTIFACT_BYTES
    include_sha256: bool = False


class ListBody(TrajectoryBody):
    """List a directory of the workspace."""

    path: str = "."
    recursive: bool = False
    max_entries: int = DEFAULT_ARTIFACT_ENTRIES


class ArchiveBody(TrajectoryBody):
    """Pack a directory of the workspace."""

    path: str = "."
    format: Literal["tar.gz", "tgz"] = "tar.gz"
    max_bytes: int = DEFAULT_ARTIFACT_BYTES
    max_entries: int = DEFAULT_ARTIFACT_ENTRIES


class ToolExecutorServer:
    """Serves an executor and the slots of trajectories."""

    def __init__(
        self, backend: ToolBackend, executor: ToolExecutor, slots: TrajectorySlots, options: ToolExecutorServerOptions
    ) -> None:
        self._backend = backend
        self._executor = executor
        self._slots = slots
        self._calls = self._running = 0
        routes = (
            post("/execute", ExecuteBody, self._execute),
            post("/release", ReleaseBody, self._release),
            post("/artifacts/read", ReadBody, self._read),
            post("/artifacts/list", ListBody, self._list),
            post("/artifacts/archive", ArchiveBody, self._archive),
            get("/status", self._status),
            get("/health", self._health),
        )
        self.service = HttpService(routes, options)

    async def _execute(self, body: ExecuteBody) -> dict[str, Any]:
        try:
            call = self._executor.check(ToolCall.parse(secrets.token_hex(8), body.tool, body.args))
        except UnusableCallError as problem:
            return unusable_json(str(problem))
        self._calls += 1
        self._running += 1
        try:
            return result_json(await self._run(body, call))
        finally:
            self._running -= 1

    async def _run(self, body: ExecuteBody, call: ToolCall) -> ExecutionResult:
        if self._executor.is_external(call.name):
            return await self._executor.run_external(call, body.trajectory_id, timeout_s=body.timeout)
        async with self._slots.use(body.trajectory_id) as slot:
            return await self._executor.run(Workspace(self._backend, slot), call, timeout_s=body.timeout)

    async def _release(self, body: ReleaseBody) -> dict[str, Any]:
        return {"released": await self._slots.release(body.trajectory_id, reset_workspace=body.reset_workspace)}

    def _existing_slot(self, body: TrajectoryBody) -> AbstractAsyncContextManager[Slot]:
        return self._slots.use(body.trajectory_id, acquire=False)

    async def _read(self, body: ReadBody) -> dict[str, Any]:
        async with self._existing_slot(body) as slot:
            content = await self._backend.read_artifact(
                slot,
                body.path,
                encoding=body.encoding,
                max_bytes=body.max_bytes,
                include_sha256=body.include_sha256,
            )
        return content.to_json()

    async def _list(self, body: ListBody) -> dict[str, Any]:
        async with self._existing_slot(body) as slot:
            listing = await self._backend.list_artifacts(
                slot, body.path, recursive=body.recursive, max_entries=body.max_entries
            )
        return listing.to_json()

    async def _archive(self, body: ArchiveBody) -> dict[str, Any]:
        async with self._existing_slot(body) as slot:
            archive = await self._backend.archive_artifacts(
                slot, body.path, max_bytes=body.max_bytes, max_entries=body.max_entries
            )
        return archive.to_json()

    async def _status(self) -> dict[str, Any]:
        return {
            "trajectories": len(self._slots),
            "calls": self._calls,
            "calls_running": self._running,
            "pool": asdict(self._backend.get_stats()),
        }

    async def _health(self) -> dict[str, Any]:
        if not self._backend.get_stats().sandboxes:
            raise RefusalError("there is no sandbox at the moment", 503, "sandbox_unavailable")
        return {"status": "ok"}


async def serve(options: ToolExecutorServerOptions) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: an option cannot work, or the address is taken.
        SandboxError: there is no such backend in this version, or it does not start.
        ToolServerError: the external tool server cannot be reached.
    """
    stop = stop_signal()
    executor = ToolExecutor(Toolsets().resolve(options.enabled_toolsets, options.disabled_toolsets), options)
    async with external_tools(options, ()) as external, create_tool_backend(options) as backend:
        executor.offer(external)
        slots = TrajectorySlots(backend, options.idle_timeout_s)
        server = ToolExecutorServer(backend, executor, slots, options)
        async with server.service.listening() as port:
            announce(port)
            await stop.wait()
            server.service.closing = True
            # Calls under way are answered with `slot_lost`.
            await slots.close()


def _chosen_backend(arguments: Sequence[str], variables: Mapping[str, str]) -> str:
    """What `tool_pool_mode` is going to be; asked before the options are read, since the backend may have some of its own."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--tool-pool-mode", dest="mode", nargs="?")
    given = flags.parse_known_args(arguments)[0].mode or variables.get("TOOL_EXECUTOR_TOOL_POOL_MODE")
    return given or str(ToolExecutorServerOptions.model_fields["tool_pool_mode"].default)


def main() -> int:
    """Run until told to stop; the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        options = options_with(ToolExecutorServerOptions, _chosen_backend(sys.argv[1:], os.environ))
        asyncio.run(serve(options.read(__doc__ or "", sys.argv[1:], os.environ, ALIASES)))
    except (HermesEnvsError, SandboxError) as reason:
        sys.stderr.write(f"error: {' '.join(str(reason).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
