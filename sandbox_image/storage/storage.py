"""The storage of a server: makes, freezes, copies and discards workspaces."""

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
from sandbox_image.storage.mount_support import MountSupport, try_out
from sandbox_image.storage.trash import Trash
from sandbox_image.storage.trees import copy_files, copy_tree, disk_usage, move_tree
from sandbox_image.storage.volumes import Volume, Volumes

MAX_CHAIN = 32
"""The longest chain of layers; on top of that, a layer is a copy of all of the workspace. The kernel's limit is 500."""


@dataclass(frozen=True)
class StorageOptions:
    """The limits of workspaces and layers. `layer_bytes` None: half of the free disk space when the server starts."""

    workspace_bytes: int = WORKSPACE_BYTES
    workspace_inodes: int = WORKSPACE_INODES
    workspaces_on_disk: bool = False
    layer_bytes: int | None = None


@dataclass(frozen=True)
class MountedWorkspace:
    """The files of a slot from one reset to the next; without a `volume` they are in a plain directory."""

    directory: SlotDirectory
    layer: FrozenLayer | None
    volume: Volume | None


class Storage:
    """Makes and discards workspaces, and keeps the layers that they start from."""

    def __init__(self, data_dir: DataDir, support: MountSupport, volumes: Volumes | None, options: StorageOptions) -> None:
        self._data_dir = data_dir
        self._support = support
        self._volumes = volumes
        self._options = options
        self._trash = Trash(data_dir.trash)
        layer_bytes = options.layer_bytes or shutil.disk_usage(data_dir.path).free // 2
        self.layers = Layers(data_dir.layers, self._trash, layer_bytes)
        self._layer_bytes = layer_bytes

    @classmethod
    def prepare(
        cls, data_dir: DataDir, blueprint: Blueprint, directories: Sequence[SlotDirectory], options: StorageOptions
    ) -> Storage:
        """Find out which mounts are possible, and prepare for them. Must run before there is a second thread.

        Raises:
            StartupError: a mount fails that has worked in the trial.
        """
        if blueprint.isolation == "none" and os.geteuid() != 0:
            support = MountSupport.none("an ordinary user's commands that run without isolation see no mounts")
        else:
            support = try_out(data_dir.path / "trial", directories[0].uid)
        if support.no_mounts is not None:
            return cls(data_dir, support, None, options)
        try:
            if os.geteuid() == 0:
                shared = blueprint.shared_path(blueprint.slots_directory)
            else:
                linux.enter_own_mounts()
                shared = str(data_dir.path)
                linux.mount(shared, shared, flags=linux.MS_BIND)
            # Later mounts there propagate into the boxes.
            linux.mount("none", shared, flags=linux.MS_SHARED)
            overlay = support.no_overlay is None
            volumes = Volumes(data_dir.path, overlay=overlay, inodes=options.workspace_inodes)
            for directory in directories:
                directory.workspace.mkdir()
                volumes.view(directory.uid)
        except OSError as error:
            raise StartupError(f"cannot prepare workspaces: {error.strerror}") from error
        return cls(data_dir, support, volumes, options)

    @property
    def mounts(self) -> bool:
        """Whether workspaces are mounted, which is possible while a box runs."""
        return self._volumes is not None

    def limits(self) -> dict[str, Any]:
        """The limits that are enforced, for `/health`; for the others the reason."""
        enforced: dict[str, Any] = {"layers": "overlay", "layer_bytes": self._layer_bytes}
        if self._support.no_overlay is not None:
            enforced |= {"layers": "copy", "layers_are_copied_because": self._support.no_overlay}
        if self._options.workspaces_on_disk or self._volumes is None:
            reason = "workspaces are kept on disk" if self._volumes is not None else self._support.no_mounts
            return enforced | {"workspaces": "disk", "workspaces_are_unlimited_because": reason}
        options = self._options
        quota = {"workspace_bytes": options.workspace_bytes, "workspace_inodes": options.workspace_inodes}
        return enforced | {"workspaces": "memory"} | quota

    def defence(self) -> Defence:
        """The defence `DISK`: slots cannot fill the disk."""
        limits = self.limits()
        if limits["workspaces"] == "disk":
            return Defence(False, str(limits["workspaces_are_unlimited_because"]))
        return Defence(True, f"{limits['workspace_bytes']} bytes and {limits['workspace_inodes']} files in memory")

    async def make(
        self, directory: SlotDirectory, layer: FrozenLayer | None, memory_bytes: int, *, for_layer: bool
    ) -> MountedWorkspace:
        """Make a workspace that starts from a layer, and is going to be frozen if it is `for_layer`.

        Files in memory get at most half of the slot's `memory_bytes`: they count as memory, and no kill frees them. Takes over
        the caller's reference to the layer, and gives it back when the workspace is discarded or cannot be made.

        Raises:
            SlotServerError, OSError: it cannot be made.
        """
        workspace = MountedWorkspace(directory, layer, None)
        try:
            if self._volumes is None:
                _make_directory(directory)
            else:
                size = min(self._options.workspace_bytes, memory_bytes // 2)
                volume = self._mount(self._volumes, directory, layer, size, for_layer)
                workspace = MountedWorkspace(directory, layer, volume)
            if layer is not None and not self._overlays:
                await copy_tree(str(self.layers.path(layer.number) / FILES), str(directory.workspace), directory.uid)
        except BaseException:
            self.discard(workspace)
            raise
        return workspace

    def discard(self, workspace: MountedWorkspace) -> None:
        """Remove a workspace from its directory; its files are deleted in the background."""
        volume = workspace.volume
        if volume is not None:
            self._unmount(volume)
            if volume.number is not None:
                self.layers.give_up(volume.number)
        elif self._volumes is None and workspace.directory.unmounted.exists():
            self._trash.take(workspace.directory.unmounted)
        self.layers.leave(workspace.layer)

    async def freeze(self, workspace: MountedWorkspace, name: str) -> FrozenLayer:
        """Turn a workspace without running processes into a layer with a claimed name; the caller gets a reference to it.

        Raises:
            SlotServerError, OSError: it fails; the workspace is gone as well.
        """
        volume = workspace.volume
        if volume is None and self._volumes is None:
            number = self.layers.reserve()
            move_tree(workspace.directory.unmounted, self.layers.path(number) / FILES)
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
        """Make a layer with a claimed name of a copy of the workspace; the caller gets a reference to it.

        Raises:
            RequestError: there is no room.
            SlotServerError, OSError: the copy fails.
        """
        volume = workspace.volume
        whole = volume is None or not self._overlays or self._is_deep(workspace)
        number = self.layers.reserve()
        try:
            source = str(workspace.directory.workspace) if volume is None or whole else volume.files
            target, descriptors = str(self.layers.path(number)), []
            if self._volumes is not None and volume is not None:
                # In the view of the slot's user, so that the files get the owner of layers.
                target = self._volumes.path(workspace.directory.uid, number)
                descriptors = [*volume.descriptors, self._volumes.view(workspace.directory.uid)]
            await copy_files(source, f"{target}/{FILES}", descriptors)
            size = await disk_usage(self.layers.path(number))
            if not evictable and not self.layers.make_room(size):
                raise RequestError(ErrorKind.NO_ROOM, f"no room: {size} bytes, the layers have {self._layer_bytes} together")
        except BaseException:
            self.layers.give_up(number)
            raise
        return self.layers.add(name, number, None if whole else workspace.layer, size, evictable=evictable)

    async def close(self) -> None:
        """Unmount what is left, after all workspaces have been discarded."""
        await self._trash.close()
        if self._volumes is not None:
            self._volumes.close()
            if os.geteuid() != 0:
                linux.unmount(str(self._data_dir.path))

    @property
    def _overlays(self) -> bool:
        return self._support.no_overlay is None

    def _base(self, workspace: MountedWorkspace) -> FrozenLayer | None:
        return workspace.layer if self._overlays else None

    def _is_deep(self, workspace: MountedWorkspace) -> bool:
        base = self._base(workspace)
        return base is not None and len(base.chain()) >= MAX_CHAIN

    def _mount(
        self, volumes: Volumes, directory: SlotDirectory, layer: FrozenLayer | None, size: int, for_layer: bool
    ) -> Volume:
        below = [below.number for below in layer.chain()] if layer is not None and self._overlays else []
        number = self.layers.reserve() if for_layer or self._options.workspaces_on_disk else None
        try:
            return volumes.mount(str(directory.workspace), directory.uid, below, number, size=size)
        except OSError:
            if number is not None:
                self.layers.give_up(number)
            raise

    def _unmount(self, volume: Volume) -> None:
        volume.unmount()
        self._trash.close_files(volume.descriptors)


def _make_directory(directory: SlotDirectory) -> None:
    directory.unmounted.mkdir(mode=0o700)
    if directory.uid is None:
        return
    try:
        os.chown(directory.workspace, directory.uid, directory.uid)
    except OSError as error:
        # The user namespace of a container may map a few users only.
        raise BoxError(f"root cannot become user {directory.uid} here ({error.strerror}); be an ordinary user") from error
