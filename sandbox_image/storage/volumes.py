"""The file systems of workspaces: memory of a limited size, mounted upon layers.

A workspace is an overlay: below it the layers it starts from, which it shares with others and cannot change, above them a tmpfs
of its own that takes what is written. So it is there at once, whatever the size of the layers, and its size and number of files
are limited by the kernel. What is to become a layer is written to disk instead: freezing it then moves nothing.

As root, every slot has a user of its own, while a layer's files belong to one user who is nobody. Each slot therefore has a
*view* of the layers, a mount in which they belong to the slot's user. An ordinary user's slots are all of that user.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox_image.kernel import linux
from sandbox_image.storage.layers import FILES

LAYER_OWNER = 59_999
"""The user and group to whom the files of layers belong on disk when the server is root."""
EMPTY = 0
"""The number of a layer without files, upon which workspaces without a layer stand."""
_WORK = "work"
_FLAGS = linux.MS_NOSUID | linux.MS_NODEV


@dataclass(frozen=True)
class Volume:
    """A mounted workspace. `files` are its own, in the directory of the layers called `number` or in memory."""

    point: str
    files: str
    number: int | None
    descriptors: tuple[int, ...]

    def unmount(self) -> None:
        """Take it from its place; what is in memory is freed when the descriptors are closed."""
        linux.unmount(self.point)


class Volumes:
    """Mounts workspaces; needs a mount namespace in which that is allowed."""

    def __init__(self, directory: Path, *, overlay: bool, size: int, inodes: int) -> None:
        """`directory` has a directory `layers`; beside it places for mounts that nobody else needs are made."""
        self._layers = directory / "layers"
        self._views_directory = directory / "views"
        self._scratch = directory / "scratch"
        self._overlay = overlay
        self._memory = f"size={size},nr_inodes={inodes},mode=700"
        self._views: dict[int | None, int] = {}
        for path in (self._views_directory, self._scratch, self._layers / str(EMPTY)):
            path.mkdir(mode=0o700)
        (self._layers / str(EMPTY) / FILES).mkdir()

    def view(self, owner: int | None) -> int:
        """A descriptor of the layers' directory as a user sees it; None is the server's own user.

        Must be called for the first time for an owner before there is a second thread.

        Raises:
            OSError: owners cannot be translated here.
        """
        if owner not in self._views:
            path = self._layers
            if owner is not None and self._overlay:
                path = self._views_directory / str(owner)
                path.mkdir()
                # The overlay makes its own files as root.
                namespace = linux.user_namespace({0: 0, LAYER_OWNER: owner})
                try:
                    linux.mount_with_other_owners(str(self._layers), str(path), namespace)
                finally:
                    os.close(namespace)
            self._views[owner] = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        return self._views[owner]

    def mount(self, point: str, owner: int | None, layers: Sequence[int], number: int | None) -> Volume:
        """Mount a workspace that starts from layers, the top one first, or without an overlay from nothing.

        What is written to it lies in the reserved directory of the layers called `number`, or else in memory.

        Raises:
            OSError: no memory or room for it.
        """
        if number is not None:
            return self._mount(point, owner, layers, number, self.path(owner, number))
        linux.mount("workspace", str(self._scratch), "tmpfs", _FLAGS, self._memory)
        try:
            return self._mount(point, owner, layers, number, str(self._scratch))
        finally:
            linux.unmount(str(self._scratch))

    def close(self) -> None:
        """Unmount the views."""
        for owner, view in self._views.items():
            os.close(view)
            with suppress(OSError):
                linux.unmount(str(self._views_directory / str(owner)))
        self._views.clear()
        for path in (self._views_directory, self._scratch):
            shutil.rmtree(path)

    def path(self, owner: int | None, number: int) -> str:
        """A directory of the layers as a user sees it; for this process and those that inherit the view's descriptor."""
        # What the kernel shows of a mount in the box names no directory of the host then.
        return f"/proc/self/fd/{self.view(owner)}/{number}"

    def _mount(self, point: str, owner: int | None, layers: Sequence[int], number: int | None, directory: str) -> Volume:
        descriptors = [os.open(directory, os.O_RDONLY | os.O_DIRECTORY)]
        try:
            holder = f"/proc/self/fd/{descriptors[0]}"
            files = f"{holder}/{FILES}"
            lower = [f"{self.path(owner, layer)}/{FILES}" for layer in layers]
            os.mkdir(files)
            os.chmod(files, stat.S_IMODE(os.stat(lower[0]).st_mode) if lower else 0o700)
            if owner is not None:
                os.chown(files, owner, owner)
            if self._overlay:
                os.mkdir(f"{holder}/{_WORK}", 0o700)
                places = f"lowerdir={':'.join(lower or [f'{self.path(owner, EMPTY)}/{FILES}'])},upperdir={files}"
                options = f"{places},workdir={holder}/{_WORK},{_behaviour()}"
                linux.mount("workspace", point, "overlay", _FLAGS, options)
            else:
                linux.mount(files, point, flags=linux.MS_BIND)
            descriptors.append(os.open(point, os.O_PATH))
        except OSError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return Volume(point, files, number, tuple(descriptors))


def _behaviour() -> str:
    # Nothing of a workspace outlives the machine, so nothing need be synced. With `xino` a file has the same device number as
    # the directory that it is in, and keeps its inode number when it is written to.
    common = "volatile,xino=on,index=off,metacopy=off"
    # What a user may mount cannot rename directories of a layer: rename(2) says EXDEV, as between file systems.
    return f"{common},redirect_dir=on" if os.geteuid() == 0 else f"{common},userxattr"
