"""The file systems of workspaces: copy-on-write overlays of read-only layers, with what is written in memory.

The lower directories of a workspace's overlay are the layers that it starts from, shared and read-only; its upper directory is
a tmpfs. A workspace is therefore ready at once, whatever the size of its layers, and the kernel limits its size and its number
of files. A workspace that is to become a layer has its upper directory on disk instead: freezing it then copies nothing.

A server that is root gives every slot a user of its own, while the files of layers all belong to `LAYER_OWNER`. Each of these
users therefore has a *view* of the layers: an id-mapped mount in which the files belong to that user. All slots of an ordinary
user's server run as that user.
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
"""The user and group of the files of layers on disk, if the server is root."""
EMPTY = 0
"""The number of a layer without files, the base of workspaces without a layer."""
_WORK = "work"
_FLAGS = linux.MS_NOSUID | linux.MS_NODEV


@dataclass(frozen=True)
class Volume:
    """A mounted workspace; `files` is its upper directory: in the layer directory `number`, or in memory if that is None."""

    point: str
    files: str
    number: int | None
    descriptors: tuple[int, ...]

    def unmount(self) -> None:
        """Unmount it; its memory is freed when the descriptors are closed."""
        linux.unmount(self.point)


class Volumes:
    """Mounts workspaces, in a mount namespace in which that is allowed."""

    def __init__(self, directory: Path, *, overlay: bool, inodes: int) -> None:
        """`directory` contains the directory `layers`; mount points for internal use are made beside that."""
        self._layers = directory / "layers"
        self._views_directory = directory / "views"
        self._scratch = directory / "scratch"
        self._overlay = overlay
        self._inodes = inodes
        self._views: dict[int | None, int] = {}
        for path in (self._views_directory, self._scratch, self._layers / str(EMPTY)):
            path.mkdir(mode=0o700)
        (self._layers / str(EMPTY) / FILES).mkdir()

    def view(self, owner: int | None) -> int:
        """A descriptor of a user's view of the layers; None is the server's own user.

        The first call for a user must come before there is a second thread.

        Raises:
            OSError: id-mapped mounts are not supported.
        """
        if owner not in self._views:
            path = self._layers
            if owner is not None and self._overlay:
                path = self._views_directory / str(owner)
                path.mkdir()
                # The overlay creates its internal files as root.
                namespace = linux.user_namespace({0: 0, LAYER_OWNER: owner})
                try:
                    linux.mount_id_mapped(str(self._layers), str(path), namespace)
                finally:
                    os.close(namespace)
            self._views[owner] = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        return self._views[owner]

    def mount(self, point: str, owner: int | None, layers: Sequence[int], number: int | None, *, size: int) -> Volume:
        """Mount a workspace at `point`, on top of `layers` (the uppermost first; ignored without overlay).

        What is written to it lies in the layer directory `number`, or in memory if that is None.

        Raises:
            OSError: there is no memory or disk space left.
        """
        if number is not None:
            return self._mount(point, owner, layers, number, self.path(owner, number))
        options = f"size={size},nr_inodes={self._inodes},mode=700"
        linux.mount("workspace", str(self._scratch), "tmpfs", _FLAGS, options)
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
        """A layer directory in a user's view; for this process and those that inherit the view's descriptor."""
        # Not its real path: the kernel shows the options of a mount to the box.
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
                directories = f"lowerdir={':'.join(lower or [f'{self.path(owner, EMPTY)}/{FILES}'])},upperdir={files}"
                options = f"{directories},workdir={holder}/{_WORK},{_behaviour()}"
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
    # `volatile` never syncs: no workspace outlives a crash of the host. With `xino` a file has the device number of its
    # directory, and keeps its inode number when it is copied up.
    common = "volatile,xino=on,index=off,metacopy=off"
    # In an ordinary user's overlay, rename(2) of a directory of a layer fails with EXDEV, as between file systems.
    return f"{common},redirect_dir=on" if os.geteuid() == 0 else f"{common},userxattr"
