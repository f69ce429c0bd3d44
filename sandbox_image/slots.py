"""A slot: a workspace, the box around it, and the lease of whoever uses it."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sandbox_image.blueprint import Blueprint, Place
from sandbox_image.box import Box
from sandbox_image.errors import BoxError, RequestError, SlotServerError, ToolError
from sandbox_image.files import ReadFileArguments, WriteFileArguments, read_file, write_file
from sandbox_image.protocol import (
    DEFAULT_TIMEOUT_S,
    MAX_TIMEOUT_S,
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
from sandbox_image.shell import BashArguments, bash
from sandbox_image.trees import copy_tree, remove_tree
from sandbox_image.workspace import WorkspaceFiles

TOOLS: dict[str, type[BashArguments] | type[ReadFileArguments] | type[WriteFileArguments]] = {
    "bash": BashArguments,
    "read_file": ReadFileArguments,
    "write_file": WriteFileArguments,
}

Arguments = BashArguments | ReadFileArguments | WriteFileArguments
ArtifactRequest = ArtifactReadRequest | ArtifactListRequest | ArtifactArchiveRequest
Request = TypeVar("Request", bound=ArtifactRequest)
Answer = TypeVar("Answer", ArtifactContent, ArtifactListing, ArtifactArchive)

_LAYER_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def check_call(request: ExecuteRequest) -> Arguments:
    """The arguments of a tool call, checked.

    Raises:
        RequestError: an unknown tool, arguments that it does not take, or a timeout out of range.
    """
    kind = TOOLS.get(request.tool)
    if kind is None:
        raise RequestError(ErrorKind.BAD_REQUEST, f"unknown tool {request.tool!r}; there are {', '.join(TOOLS)}")
    if request.timeout is not None and not 0 < request.timeout <= MAX_TIMEOUT_S:
        raise RequestError(ErrorKind.BAD_REQUEST, f"field 'timeout' must be above 0 and at most {MAX_TIMEOUT_S:g} seconds")
    try:
        arguments = kind.from_json(request.args)
        arguments.check()
    except ProtocolError as error:
        raise RequestError(ErrorKind.BAD_REQUEST, f"args of {request.tool}: {error}") from error
    return arguments


class Layers:
    """The frozen workspaces of a server, by name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names: set[str] = set()

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._names)

    def path(self, name: str) -> Path:
        """Where a layer is.

        Raises:
            RequestError: there is no such layer.
        """
        if name not in self._names:
            raise RequestError(ErrorKind.NOT_FOUND, f"no layer {name!r}")
        return self._directory / name

    def check_new(self, name: str) -> None:
        """Make sure that a layer can get this name.

        Raises:
            RequestError: it is not a name, or it is taken.
        """
        if not _LAYER_NAME.fullmatch(name) or name in (".", ".."):
            raise RequestError(ErrorKind.BAD_REQUEST, "field 'name' must be 1 to 128 of the characters A-Z a-z 0-9 . _ -")
        if name in self._names:
            raise RequestError(ErrorKind.BAD_REQUEST, f"there is a layer {name!r} already")

    def add(self, name: str, workspace: Path) -> None:
        """Take over a directory.

        Raises:
            RequestError: as `check_new`.
        """
        self.check_new(name)
        os.rename(workspace, self._directory / name)
        self._names.add(name)


class Trash:
    """Deletes directories later, one after the other, so that a reset does not wait for it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def take(self, path: Path) -> None:
        """Move a directory away now; its name is free when this returns."""
        doomed = self._directory / secrets.token_hex(8)
        os.rename(path, doomed)
        task = asyncio.create_task(self._remove(doomed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait until everything is deleted."""
        await asyncio.gather(*self._tasks)

    async def _remove(self, path: Path) -> None:
        async with self._turn:
            await asyncio.to_thread(remove_tree, path)


class Slot:
    """One workspace at a time, calls in it one after the other."""

    def __init__(self, slot_id: str, place: Place, blueprint: Blueprint, layers: Layers, trash: Trash) -> None:
        self.slot_id = slot_id
        self.lease = _new_lease()
        self._place = place
        self._blueprint = blueprint
        self._layers = layers
        self._trash = trash
        self._files = WorkspaceFiles(place)
        self._box: Box | None = None
        self._trouble = "it has not started"
        self._turn = asyncio.Lock()
        self._resets = asyncio.Lock()
        self._layer: str | None = None
        self._network = False
        self._closing = False
        self._memory_kills = place.group.kills()

    def state(self) -> SlotState:
        """What it is at the moment."""
        state = "failed" if self._box is None or not self._box.alive else "ready"
        if self._turn.locked():
            state = "busy"
        return SlotState.from_json(
            {"slot_id": self.slot_id, "lease": self.lease, "state": state, "layer": self._layer, "network": self._network}
        )

    async def start(self) -> None:
        """Make an empty workspace and a box around it.

        Raises:
            BoxError: no box can be made.
        """
        await self._renew(None, network=False)

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
        """Look at the workspace; does not wait for a running call.

        Raises:
            RequestError: the lease is not the slot's, before or after; or whatever `serve` finds.
        """
        self._check_lease(request.lease)
        lease = self.lease
        answer = await asyncio.to_thread(serve, self._files, request)
        # A reset in between has taken away the files that were being read.
        self._check_lease(lease)
        return answer

    async def reset(self, layer: str | None, *, network: bool) -> SlotState:
        """End the running call and start again with a new workspace, box and lease.

        Raises:
            RequestError: no such layer (nothing has changed then), or the slot cannot be made ready.
        """
        if layer is not None:
            self._layers.path(layer)
        async with self._resets:
            self.lease = _new_lease()
            if self._box is not None:
                self._box.doom("the slot was reset")
            async with self._turn:
                await self._renew_or_fail(layer, network)
        return self.state()

    async def freeze(self, name: str, lease: str | None) -> SlotState:
        """Keep the workspace as a layer, and start again with an empty one.

        Raises:
            RequestError: a bad or taken name or a lease that is not the slot's (nothing has changed then), or the slot cannot
                be made ready.
        """
        self._layers.check_new(name)
        async with self._resets, self._turn:
            self._check_lease(lease)
            box = self._require_box()
            self.lease = _new_lease()
            try:
                await box.kill("the slot was frozen")
            except BoxError as error:
                raise self._failure(str(error)) from error
            self._layers.add(name, self._place.workspace)
            await self._renew_or_fail(None, network=False)
        return self.state()

    async def close(self) -> None:
        """Kill everything in it; a running call ends with `SHUTTING_DOWN`."""
        self._closing = True
        if self._box is not None:
            await self._box.kill("the server stops")

    async def _call(self, box: Box, request: ExecuteRequest, arguments: Arguments) -> ExecutionResult:
        if isinstance(arguments, BashArguments):
            timeout_s = DEFAULT_TIMEOUT_S if request.timeout is None else request.timeout
            return await bash(box, arguments, timeout_s, sandboxed=self._blueprint.isolation != "none")
        if isinstance(arguments, ReadFileArguments):
            return await asyncio.to_thread(read_file, self._files, arguments)
        return await asyncio.to_thread(write_file, self._files, arguments)

    def _out_of_memory(self) -> bool:
        """Whether a process was killed for the memory limit since this was last asked."""
        before, self._memory_kills = self._memory_kills, self._place.group.kills()
        return self._memory_kills != before

    async def _renew_or_fail(self, layer: str | None, network: bool) -> None:
        try:
            await self._renew(layer, network=network)
        except (SlotServerError, OSError) as error:
            raise self._failure(str(error)) from error

    async def _renew(self, layer: str | None, *, network: bool) -> None:
        box, self._box = self._box, None
        self._trouble = "it is being reset"
        try:
            if box is not None:
                await box.kill("the slot was reset")
            workspace = self._place.workspace
            if workspace.exists():
                self._trash.take(workspace)
            if layer is not None:
                await copy_tree(str(self._layers.path(layer)), str(workspace), self._place.uid)
            else:
                self._make_empty(workspace)
            self._box = await Box.start(self._blueprint, self._place, network=network)
        except (SlotServerError, OSError) as error:
            self._trouble = str(error)
            raise
        self._layer, self._network = layer, network
        self._memory_kills = self._place.group.kills()
        if self._closing:
            await self._box.kill("the server stops")

    def _make_empty(self, workspace: Path) -> None:
        workspace.mkdir(mode=0o700)
        if self._place.uid is None:
            return
        try:
            os.chown(workspace, self._place.uid, self._place.uid)
        except OSError as error:
            # Root of a container or user namespace that knows a few users only.
            raise BoxError(f"root cannot become user {self._place.uid} here ({error.strerror}); be an ordinary user") from error

    def _check_lease(self, lease: str | None) -> None:
        if self._closing:
            raise RequestError(ErrorKind.SHUTTING_DOWN, "the server stops")
        if lease is not None and lease != self.lease:
            raise RequestError(ErrorKind.LEASE_EXPIRED, f"{self.slot_id}: the slot was reset since this lease was given")

    def _require_box(self) -> Box:
        if self._box is None:
            raise self._failure(self._trouble)
        if not self._box.alive:
            raise self._failure(self._box.verdict)
        return self._box

    def _failure(self, reason: str) -> RequestError:
        if self._closing:
            return RequestError(ErrorKind.SHUTTING_DOWN, "the server stops")
        return RequestError(ErrorKind.SLOT_FAILED, f"{self.slot_id}: {reason}")


def _new_lease() -> str:
    return secrets.token_hex(12)
