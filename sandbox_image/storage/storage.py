"""Where the files of slots lie: how a workspace comes to be, and what becomes of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sandbox_image.box.blueprint import Blueprint, SlotDirectory
from sandbox_image.box.defences import Defence
from sandbox_image.errors import BoxError, RequestError, StartupError
from sandbox_image.kernel import linux
from sandbox_image.protocol import WORKSPACE_BYTES, WORKSPACE_INODES, ErrorKind
from sandbox_image.storage.datadir import DataDir
from sandbox_image.storage.layers import FILES, FrozenLayer, Layers
from sandbox_image.storage.trash import Trash
from sandbox_image.storage.trees import copy_files, copy_tree, disk_usage, move_tree
from sandbox_image.storage.trial import MountSupport, try_out
from sandbox_image.storage.volumes import Volume, Volumes

MAX_CHAIN = 32
"""Layers upon each other; what would stand on more is copied with all that is below it. The kernel takes 500."""


@dataclass(frozen=True)
class StorageOptions:
    """How much room there is. `layer_bytes` None: half of what is free when the server starts."""

    workspace_bytes: int = WORKSPACE_BYTES
    workspace_inodes: int = WORKSPACE_INODES
    workspaces_on_disk: bool = False
    layer_bytes: int | None = None


@dataclass(frozen=True)
class MountedWorkspace:
    """The files of a slot from one reset to the next. Without a volume they are a directory among the server's files."""

    place: SlotDirectory
    layer: FrozenLayer | None
    volume: Volume | None


class Storage:
    """Makes workspaces and takes them back, and keeps the layers that they start from."""

    def __init__(self, data_dir: DataDir, means: MountSupport, volumes: Volumes | None, options: StorageOptions) -> None:
        self._data_dir = data_dir
        self._means = means
        self._volumes = volumes
        self._options = options
        self._trash = Trash(data_dir.trash)
        layer_bytes = options.layer_bytes or shutil.disk_usage(data_dir.path).free // 2
        self.layers = Layers(data_dir.layers, self._trash, layer_bytes)
        self._layer_bytes = layer_bytes

    @classmethod
    def prepare(
        cls, data_dir: DataDir, blueprint: Blueprint, places: Sequence[SlotDirectory], options: StorageOptions
    ) -> Storage:
        """Find out what can be done here, and get ready to do it in these places. Must run before there is a second thread.

        Raises:
            StartupError: what was tried out does not work a second time.
        """
        if blueprint.isolation == "none" and os.geteuid() != 0:
            means = MountSupport.none("an ordinary user's commands that run without isolation see no mounts")
        else:
            means = try_out(data_dir.path / "trial", places[0].uid)
        if means.no_mounts is not None:
            return cls(data_dir, means, None, options)
        try:
            if os.geteuid() == 0:
                shared = blueprint.staged(blueprint.slots_directory)
            else:
                linux.enter_own_mounts()
                shared = str(data_dir.path)
                linux.mount(shared, shared, flags=linux.MS_BIND)
            # What is mounted there later shows in the boxes, too.
            linux.mount("none", shared, flags=linux.MS_SHARED)
            overlay = means.no_overlay is None
            volumes = Volumes(data_dir.path, overlay=overlay, size=options.workspace_bytes, inodes=options.workspace_inodes)
            for place in places:
                place.workspace.mkdir()
                volumes.view(place.uid)
        except OSError as error:
            raise StartupError(f"cannot prepare workspaces: {error.strerror}") from error
        return cls(data_dir, means, volumes, options)

    @property
    def mounts(self) -> bool:
        """Whether workspaces are mounted, so that they can come and go while a box is there."""
        return self._volumes is not None

    def limits(self) -> dict[str, Any]:
        """What is enforced, for `/health`; what is not, with the reason."""
        enforced: dict[str, Any] = {"layers": "overlay", "layer_bytes": self._layer_bytes}
        if self._means.no_overlay is not None:
            enforced |= {"layers": "copy", "layers_are_copied_because": self._means.no_overlay}
        if self._options.workspaces_on_disk or self._volumes is None:
            reason = "workspaces are kept on disk" if self._volumes is not None else self._means.no_mounts
            return enforced | {"workspaces": "disk", "workspaces_are_unlimited_because": reason}
        options = self._options
        quota = {"workspace_bytes": options.workspace_bytes, "workspace_inodes": options.workspace_inodes}
        return enforced | {"workspaces": "memory"} | quota

    def defence(self) -> Defence:
        """Whether slots are kept from filling the disk."""
        limits = self.limits()
        if limits["workspaces"] == "disk":
            return Defence(False, str(limits["workspaces_are_unlimited_because"]))
        return Defence(True, f"{limits['workspace_bytes']} bytes and {limits['workspace_inodes']} files in memory")

    async def make(self, place: SlotDirectory, layer: FrozenLayer | None, *, for_layer: bool) -> MountedWorkspace:
        """A new workspace that starts from a layer; `leave`s the layer when it is discarded, or cannot be made.

        `for_layer` says that it is going to be frozen.

        Raises:
            SlotServerError, OSError: it cannot be made.
        """
        workspace = MountedWorkspace(place, layer, None)
        try:
            if self._volumes is None:
                _make_directory(place)
            else:
                workspace = MountedWorkspace(place, layer, self._mount(self._volumes, place, layer, for_layer))
            if layer is not None and not self._overlays:
                await copy_tree(str(self.layers.path(layer.number) / FILES), str(place.workspace), place.uid)
        except BaseException:
            self.discard(workspace)
            raise
        return workspace

    def discard(self, workspace: MountedWorkspace) -> None:
        """Take a workspace from its place; its files go later."""
        volume = workspace.volume
        if volume is not None:
            self._unmount(volume)
            if volume.number is not None:
                self.layers.give_up(volume.number)
        elif self._volumes is None and workspace.place.unmounted.exists():
            self._trash.take(workspace.place.unmounted)
        self.layers.leave(workspace.layer)

    async def freeze(self, workspace: MountedWorkspace, name: str) -> FrozenLayer:
        """Make a workspace in which nothing runs any more a layer with a claimed name. The workspace is gone then.

        Whoever made it uses the layer.

        Raises:
            SlotServerError, OSError: it cannot be kept; the workspace is gone as well.
        """
        volume = workspace.volume
        if volume is None and self._volumes is None:
            number = self.layers.reserve()
            move_tree(workspace.place.unmounted, self.layers.path(number) / FILES)
        elif volume is not None and volume.number is not None and not self._is_deep(workspace):
            number = volume.number
            self._unmount(volume)
        else:
            try:
                return await self.copy(workspace, name, evictable=True)
            finally:
                self.discard(workspace)
        try:
            size = await disk_usage(self.layers.path(number))
            return self.layers.add(name, number, self._base(workspace), size, evictable=True)
        finally:
            self.layers.leave(workspace.layer)

    async def copy(self, workspace: MountedWorkspace, name: str, *, evictable: bool) -> FrozenLayer:
        """Make what is in a workspace now a layer with a claimed name. Whoever made it uses the layer.

        Raises:
            RequestError: there is no room.
            SlotServerError, OSError: it cannot be copied.
        """
        volume = workspace.volume
        whole = volume is None or not self._overlays or self._is_deep(workspace)
        number = self.layers.reserve()
        try:
            source = str(workspace.place.workspace) if volume is None or whole else volume.files
            target, descriptors = str(self.layers.path(number)), []
            if self._volumes is not None and volume is not None:
                # Through the view of the slot, so that the files get the owner that layers have.
                target = self._volumes.path(workspace.place.uid, number)
                descriptors = [*volume.descriptors, self._volumes.view(workspace.place.uid)]
            await copy_files(source, f"{target}/{FILES}", descriptors)
            size = await disk_usage(self.layers.path(number))
            if not evictable and not self.layers.make_room(size):
                raise RequestError(ErrorKind.NO_ROOM, f"no room: {size} bytes, the layers have {self._layer_bytes} together")
        except BaseException:
            self.layers.give_up(number)
            raise
        return self.layers.add(name, number, None if whole else workspace.layer, size, evictable=evictable)

    async def close(self) -> None:
        """Let go of everything; all workspaces have been discarded."""
        await self._trash.close()
        if self._volumes is not None:
            self._volumes.close()
            if os.geteuid() != 0:
                linux.unmount(str(self._data_dir.path))

    @property
    def _overlays(self) -> bool:
        return self._means.no_overlay is None

    def _base(self, workspace: MountedWorkspace) -> FrozenLayer | None:
        return workspace.layer if self._overlays else None

    def _is_deep(self, workspace: MountedWorkspace) -> bool:
        base = self._base(workspace)
        return base is not None and len(base.chain()) >= MAX_CHAIN

    def _mount(self, volumes: Volumes, place: SlotDirectory, layer: FrozenLayer | None, for_layer: bool) -> Volume:
        below = [below.number for below in layer.chain()] if layer is not None and self._overlays else []
        number = self.layers.reserve() if for_layer or self._options.workspaces_on_disk else None
        try:
            return volumes.mount(str(place.workspace), place.uid, below, number)
        except OSError:
            if number is not None:
                self.layers.give_up(number)
            raise

    def _unmount(self, volume: Volume) -> None:
        volume.unmount()
        self._trash.close_files(volume.descriptors)


def _make_directory(place: SlotDirectory) -> None:
    place.unmounted.mkdir(mode=0o700)
    if place.uid is None:
        return
    try:
        os.chown(place.workspace, place.uid, place.uid)
    except OSError as error:
        # Root of a container or user namespace that knows a few users only.
        raise BoxError(f"root cannot become user {place.uid} here ({error.strerror}); be an ordinary user") from error
