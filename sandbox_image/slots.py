"""A slot: a workspace, the box around it, and the lease of its user."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Literal, TypeVar

from sandbox_image.box.blueprint import Blueprint, BoxLimits
from sandbox_image.box.box import Box
from sandbox_image.box.boxes import Boxes
from sandbox_image.box.defences import Defence
from sandbox_image.errors import BoxError, RequestError, SlotServerError, ToolError
from sandbox_image.protocol import (
    DEFAULT_TIMEOUT_S,
    ArtifactArchive,
    ArtifactArchiveRequest,
    ArtifactContent,
    ArtifactListing,
    ArtifactListRequest,
    ArtifactReadRequest,
    ErrorKind,
    ExecuteRequest,
    ExecutionResult,
    ProtocolError,
    SlotState,
)
from sandbox_image.storage.layers import FrozenLayer
from sandbox_image.storage.storage import MountedWorkspace, Storage
from sandbox_image.storage.trees import TreeCopyError
from sandbox_image.storage.workspace_files import WorkspaceFiles
from sandbox_image.tools.artifacts import contain
from sandbox_image.tools.files import ReadFileArguments, WriteFileArguments, read_file, write_file
from sandbox_image.tools.shell import BashArguments, bash
from sandbox_image.tools.stateful import BashStatefulArguments
from sandbox_image.tools.terminals import TerminalArguments, Terminals
from sandbox_image.tools.tmux import TmuxArguments

Arguments = BashArguments | TerminalArguments | ReadFileArguments | WriteFileArguments

TOOLS: dict[str, type[Arguments]] = {
    "bash": BashArguments,
    "bash_stateful": BashStatefulArguments,
    "read_file": ReadFileArguments,
    "write_file": WriteFileArguments,
    "tmux": TmuxArguments,
}

ArtifactRequest = ArtifactReadRequest | ArtifactListRequest | ArtifactArchiveRequest
Request = TypeVar("Request", bound=ArtifactRequest)
Answer = TypeVar("Answer", ArtifactContent, ArtifactListing, ArtifactArchive)


def check_call(request: ExecuteRequest) -> Arguments:
    """The arguments of a tool call, checked.

    Raises:
        RequestError: an unknown tool, or arguments that it does not take.
    """
    kind = TOOLS.get(request.tool)
    if kind is None:
        raise RequestError(ErrorKind.BAD_REQUEST, f"unknown tool {request.tool!r}; there are {', '.join(TOOLS)}")
    try:
        arguments = kind.from_json(request.args)
        arguments.check()
    except ProtocolError as error:
        raise RequestError(ErrorKind.BAD_REQUEST, f"args of {request.tool}: {error}") from error
    return arguments


class HostedSlot:
    """Has one workspace at a time and runs calls in it one after the other."""

    def __init__(self, slot_id: str, boxes: Boxes, blueprint: Blueprint, storage: Storage) -> None:
        self.slot_id = slot_id
        self.lease = _new_lease()
        self._boxes = boxes
        self._blueprint = blueprint
        self._storage = storage
        self._files = WorkspaceFiles(boxes.directory)
        self._terminals: Terminals | None = None
        self._trouble = "it has not started"
        self._turn = asyncio.Lock()
        self._resets = asyncio.Lock()
        self._workspace: MountedWorkspace | None = None
        # The layer that was frozen last: referenced until the next reset, so that it is not evicted before its first use.
        self._frozen: FrozenLayer | None = None
        # The workspaces of boxes that are still dying.
        self._past: list[MountedWorkspace] = []
        self._limits = self._usual_limits = BoxLimits(False, blueprint.groups.limits.memory_bytes)
        # What its control group allows; the limits of its box may still be others.
        self._memory_bytes = self._limits.memory_bytes
        self._closing = False
        self._memory_kills = boxes.directory.group.kills()
        self.defences: dict[str, Defence] = {}
        """The state of each defence when its box started."""

    @property
    def busy(self) -> bool:
        """Whether a call runs or it is being reset."""
        return self._turn.locked()

    def state(self) -> SlotState:
        """Its current state."""
        box = self._boxes.box
        state: Literal["ready", "busy", "failed"] = "failed" if box is None or not box.alive else "ready"
        if self.busy:
            state = "busy"
        layer = None if self._workspace is None or self._workspace.layer is None else self._workspace.layer.name
        memory_bytes = None if self._boxes.directory.group.memory is None else self._memory_bytes
        return SlotState(self.slot_id, self.lease, state, layer, self._limits.network, memory_bytes)

    async def start(self) -> None:
        """Make an empty workspace and a box around it.

        Raises:
            BoxError: no box can be made.
        """
        await self._renew(None, self._limits, for_layer=False)

    def start_ahead(self) -> None:
        """Start the spare box for the next reset in the background."""
        if not self._closing:
            self._boxes.start_ahead(self._discard_past, self._usual_limits)

    async def execute(self, request: ExecuteRequest, arguments: Arguments) -> ExecutionResult:
        """Run a tool when the calls before it have ended.

        Raises:
            RequestError: the lease is not the slot's, or the box is or gets lost.
        """
        self._check_lease(request.lease)
        async with self._turn:
            self._check_lease(request.lease)
            box = self._require_box()
            try:
                result = await self._call(box, request, arguments)
            except ToolError as error:
                result = ExecutionResult(success=False, output="", error=str(error))
            except BoxError as error:
                reason = f"{error} (its memory was used up)" if self._out_of_memory() else str(error)
                raise self._failure(reason) from error
            if "exit_code" in result.metadata and self._memory_kills is not None:
                result.metadata["oom_killed"] = self._out_of_memory()
        return result

    async def artifact(self, request: Request, serve: Callable[[WorkspaceFiles, Request], Answer]) -> Answer:
        """Read the workspace, without waiting for a running call.

        Raises:
            RequestError: the lease is not the slot's, before or afterwards; or as `serve`.
        """
        self._check_lease(request.lease)
        lease = self.lease
        answer = await asyncio.to_thread(serve, self._files, request)
        # After a reset in between, files may have been missing.
        self._check_lease(lease)
        return answer

    async def recording(self, request: ArtifactReadRequest) -> ArtifactContent:
        """The recording of the slot's terminal since the last reset.

        Raises:
            RequestError: the lease is not the slot's, there is no recording, or it is larger than asked for.
        """
        self._check_lease(request.lease)
        content = b"" if self._terminals is None else self._terminals.recording()
        if not content:
            raise RequestError(ErrorKind.NOT_FOUND, f"{request.path}: no terminal was started")
        return await asyncio.to_thread(contain, request, content)

    async def reset(
        self, layer: str | None, *, network: bool, memory_bytes: int | None = None, for_layer: bool = False
    ) -> SlotState:
        """End the running call and start again with a new workspace, box and lease.

        `memory_bytes` lowers the memory limit until the next reset.

        Raises:
            RequestError: no such layer (nothing has changed then), or the slot cannot be made ready.
        """
        limits = self._limits_of(network, memory_bytes)
        used = None if layer is None else self._storage.layers.use(layer)
        try:
            async with self._resets:
                self.lease = _new_lease()
                if self._turn.locked():
                    self._boxes.doom("the slot was reset")
                async with self._turn:
                    # Nobody would take back what is made after `close`.
                    self._check_lease(None)
                    given, used = used, None
                    await self._renew_or_fail(given, limits, for_layer=for_layer)
        finally:
            self._storage.layers.leave(used)
        if not for_layer:
            self._usual_limits = limits
        self.start_ahead()
        return self.state()

    async def freeze(self, name: str, lease: str | None) -> SlotState:
        """Keep the workspace as a layer, and start again with an empty one.

        Raises:
            RequestError: a bad or taken name or a lease that is not the slot's (nothing has changed then), or the slot cannot
                be made ready.
        """
        with self._storage.layers.claim(name):
            async with self._resets, self._turn:
                self._check_lease(lease)
                box, workspace = self._require_box(), self._require_workspace()
                self.lease = _new_lease()
                try:
                    await box.kill("the slot was frozen")
                    self._workspace = None
                    layer = await self._storage.freeze(workspace, name)
                except (SlotServerError, OSError) as error:
                    raise self._failure(str(error)) from error
                try:
                    await self._renew_or_fail(None, self._limits_of(network=False), for_layer=False)
                finally:
                    self._frozen = layer
        self.start_ahead()
        return self.state()

    async def snapshot(self, name: str, lease: str | None) -> SlotState:
        """Keep a copy of the workspace as a layer when the calls before it have ended; the slot goes on.

        Raises:
            RequestError: a bad or taken name, a lease that is not the slot's, a box that is lost, or no room for the copy.
        """
        with self._storage.layers.claim(name):
            async with self._turn:
                self._check_lease(lease)
                self._require_box()
                try:
                    layer = await self._storage.copy(self._require_workspace(), name, evictable=False)
                except (TreeCopyError, OSError) as error:
                    raise RequestError(ErrorKind.NO_ROOM, f"{self.slot_id}: cannot copy the workspace: {error}") from error
                self._storage.layers.leave(layer)
        return self.state()

    async def close(self) -> None:
        """Kill its box; a running call fails with `SHUTTING_DOWN`."""
        self._closing = True
        await self._boxes.kill("the server stops")
        async with self._turn:
            self._leave()
            self._discard_past()

    async def _call(self, box: Box, request: ExecuteRequest, arguments: Arguments) -> ExecutionResult:
        timeout_s = DEFAULT_TIMEOUT_S if request.timeout is None else request.timeout
        sandboxed = self._blueprint.isolation != "none"
        if isinstance(arguments, TerminalArguments):
            if self._terminals is None:
                self._terminals = Terminals(box, self._boxes.directory.uid, sandboxed=sandboxed)
            return await self._terminals.execute(arguments, timeout_s)
        if isinstance(arguments, BashArguments):
            return await bash(box, arguments, timeout_s, sandboxed=sandboxed)
        if isinstance(arguments, ReadFileArguments):
            return await asyncio.to_thread(read_file, self._files, arguments)
        return await asyncio.to_thread(write_file, self._files, arguments)

    def _out_of_memory(self) -> bool:
        """Whether a process was killed for the memory limit since this was last asked."""
        before, self._memory_kills = self._memory_kills, self._boxes.directory.group.kills()
        return self._memory_kills != before

    def _limits_of(self, network: bool, memory_bytes: int | None = None) -> BoxLimits:
        most = self._blueprint.groups.limits.memory_bytes
        return BoxLimits(network, most if memory_bytes is None else min(memory_bytes, most))

    async def _renew_or_fail(self, layer: FrozenLayer | None, limits: BoxLimits, *, for_layer: bool) -> None:
        try:
            await self._renew(layer, limits, for_layer=for_layer)
        except (SlotServerError, OSError) as error:
            raise self._failure(str(error)) from error

    async def _renew(self, layer: FrozenLayer | None, limits: BoxLimits, *, for_layer: bool) -> None:
        self._trouble = "it is being reset"
        unused = layer
        try:
            try:
                if limits.memory_bytes != self._memory_bytes:
                    # All of them use the memory that is limited.
                    await self._boxes.kill("the slot was reset")
                await self._boxes.vacate(limits)
            finally:
                self._leave()
            await self._limit_memory(limits.memory_bytes)
            if not self._storage.mounts:
                # A box shows the directory that is there when it starts.
                unused = None
                await self._make(layer, limits, for_layer)
            box = await self._boxes.occupy(limits)
            if self._storage.mounts:
                unused = None
                await self._make(layer, limits, for_layer)
            await box.enter(self._boxes.directory.seen_as)
            # Only now: the end of its namespaces would delay the mounts.
            self._boxes.doom_previous()
        except (SlotServerError, OSError) as error:
            self._trouble = str(error)
            self._boxes.doom_previous()
            self._boxes.doom(str(error))
            raise
        finally:
            self._storage.layers.leave(unused)
        self.defences = box.defences
        self._limits = limits
        self._memory_kills = self._boxes.directory.group.kills()
        if self._closing:
            await self._boxes.kill("the server stops")

    async def _limit_memory(self, size: int) -> None:
        """Set the limit of the control group, after the death of all boxes.

        Raises:
            OSError: it cannot be set.
        """
        if size != self._memory_bytes:
            # Their files in memory are freed in the background.
            self._discard_past()
            await asyncio.to_thread(self._boxes.directory.group.limit_memory, size)
            self._memory_bytes = size

    async def _make(self, layer: FrozenLayer | None, limits: BoxLimits, for_layer: bool) -> None:
        memory_bytes = limits.memory_bytes
        self._workspace = await self._storage.make(self._boxes.directory, layer, memory_bytes, for_layer=for_layer)
        self._files = WorkspaceFiles(self._boxes.directory)

    def _leave(self) -> None:
        """Release what belongs to the workspace."""
        workspace, self._workspace = self._workspace, None
        frozen, self._frozen = self._frozen, None
        terminals, self._terminals = self._terminals, None
        if terminals is not None:
            # Their processes end with the box.
            self._boxes.doom_previous()
            terminals.close()
        if workspace is not None:
            self._past.append(workspace)
        if workspace is not None and workspace.directory is self._boxes.directory:
            self._discard_past()
        self._storage.layers.leave(frozen)

    def _discard_past(self) -> None:
        while self._past:
            self._storage.discard(self._past.pop())

    def _check_lease(self, lease: str | None) -> None:
        if self._closing:
            raise RequestError(ErrorKind.SHUTTING_DOWN, "the server stops")
        if lease is not None and lease != self.lease:
            raise RequestError(ErrorKind.LEASE_EXPIRED, f"{self.slot_id}: the slot was reset since this lease was given")

    def _require_box(self) -> Box:
        box = self._boxes.box
        if box is None:
            raise self._failure(self._trouble)
        if not box.alive:
            raise self._failure(box.verdict)
        return box

    def _require_workspace(self) -> MountedWorkspace:
        if self._workspace is None:
            raise self._failure(self._trouble)
        return self._workspace

    def _failure(self, reason: str) -> RequestError:
        if self._closing:
            return RequestError(ErrorKind.SHUTTING_DOWN, "the server stops")
        return RequestError(ErrorKind.SLOT_FAILED, f"{self.slot_id}: {reason}")


def _new_lease() -> str:
    return secrets.token_hex(12)
