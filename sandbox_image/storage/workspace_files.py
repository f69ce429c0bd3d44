"""The files of a workspace, opened from outside of its box, where no path may lead out of the workspace.

The commands of a slot can change the meaning of every name in the workspace at any moment. A path is therefore resolved here,
one component at a time, from one open directory to the next; symbolic links are read and followed here. The kernel never
resolves more than one name. The view is that of the box: links to `/workspace/...` work, other links out are refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sandbox_image.box.blueprint import SlotDirectory
from sandbox_image.errors import OutsideWorkspaceError, ToolError
from sandbox_image.protocol import WORKSPACE

MAX_PATH_CHARACTERS = 4096
MAX_MOVES = 1024
"""How many directories are opened for one path; those above are opened again for each `..`."""
MAX_LINKS = 40
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NAME = WORKSPACE.removeprefix("/")


class WorkspaceFiles:
    """The files of one slot, by the paths that its commands use."""

    def __init__(self, directory: SlotDirectory) -> None:
        self._directory = directory

    @contextmanager
    def file(self, path: str) -> Iterator[tuple[int, os.stat_result]]:
        """A regular file, open for reading, and its status.

        Raises:
            OutsideWorkspaceError: the path leads out, or to something that is not a regular file.
            OSError: as `open` does.
        """
        with self.parent(path) as (directory, name):
            # Without O_NONBLOCK a FIFO would block; without O_NOCTTY a terminal could become the server's.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=directory)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(found.st_mode):
                raise OutsideWorkspaceError(f"{path}: not a regular file")
            yield descriptor, found
        finally:
            os.close(descriptor)

    @contextmanager
    def directory(self, path: str) -> Iterator[int]:
        """A directory, open for reading.

        Raises:
            OutsideWorkspaceError: the path leads out.
            OSError: as `open` does.
        """
        with self.parent(path) as (parent, name):
            descriptor = os.open(name, DIRECTORY_FLAGS, dir_fd=parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def parent(self, path: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """The open directory that contains the last component of a path, and the name of that component, which is no link.

        With `create`, missing directories on the way are made and given to the slot's user.

        Raises:
            OutsideWorkspaceError: the path leads out.
            ToolError: the path cannot be a path.
            OSError: a component is missing or not a directory; links in a circle.
        """
        directory, name = self._walk(path, create)
        try:
            yield directory, name
        finally:
            os.close(directory)

    def adopt(self, descriptor: int) -> None:
        """Give a file that the server has made to the slot's user."""
        if self._directory.uid is not None:
            os.fchown(descriptor, self._directory.uid, self._directory.uid)

    def _walk(self, path: str, create: bool) -> tuple[int, str]:
        walk = _Walk(self._directory.root)
        pending = deque(_NAME.split("/") if not path.startswith("/") else [])
        pending.extend(self._parts(path))
        links = 0
        try:
            while pending:
                name = pending.popleft()
                if name == "..":
                    walk.ascend()
                    continue
                if walk.at_root and name != _NAME:
                    raise OutsideWorkspaceError(f"{path}: outside of the workspace")
                target = _link_target(name, walk.here)
                if target is not None:
                    links += 1
                    if links > MAX_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    pending.extendleft(reversed(self._parts(target)))
                    if target.startswith("/"):
                        walk.restart()
                elif pending:
                    made = walk.descend(name, create)
                    if made:
                        self.adopt(walk.here)
                else:
                    return walk.here, name
            if walk.at_root:
                raise OutsideWorkspaceError(f"{path}: outside of the workspace")
        except BaseException:
            os.close(walk.here)
            raise
        return walk.here, "."

    def _parts(self, path: str) -> list[str]:
        if "\0" in path or len(path) > MAX_PATH_CHARACTERS:
            raise ToolError("path: contains a NUL character" if "\0" in path else f"path: longer than {MAX_PATH_CHARACTERS}")
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            raise ToolError("path: contains a lone surrogate") from None
        # Commands that run without a sandbox see the workspace at another path.
        if f"{path}/".startswith(f"{self._directory.seen_as}/"):
            path = WORKSPACE + path.removeprefix(self._directory.seen_as)
        return [part for part in path.split("/") if part not in ("", ".")]


class _Walk:
    """An open directory that moves through a tree, one name at a time, and a limit for the number of moves."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: list[str] = []
        self._moves = 0
        self.here = os.open(root, DIRECTORY_FLAGS)

    @property
    def at_root(self) -> bool:
        """Whether it is where it began."""
        return not self._names

    def descend(self, name: str, create: bool = False) -> bool:
        """Enter a directory; whether it was created for that."""
        made = False
        try:
            inner = self._open(name)
        except FileNotFoundError:
            if not create:
                raise
            with suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=self.here)
                made = True
            inner = self._open(name)
        self._move(inner)
        self._names.append(name)
        return made

    def ascend(self) -> None:
        """Enter the parent, by the names that led here: the `..` of a directory that is moved meanwhile may lead elsewhere."""
        names = self._names[:-1]
        self.restart()
        for name in names:
            self.descend(name)

    def restart(self) -> None:
        """Go back to the root."""
        self._move(self._open(str(self._root)))
        self._names = []

    def _open(self, name: str) -> int:
        self._moves += 1
        if self._moves > MAX_MOVES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return os.open(name, DIRECTORY_FLAGS, dir_fd=self.here)

    def _move(self, directory: int) -> None:
        os.close(self.here)
        self.here = directory


def _link_target(name: str, directory: int) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise
