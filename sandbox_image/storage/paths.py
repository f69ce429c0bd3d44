"""Opening what lies in a slot's workspace from outside of its box, without ever being led out of it.

The slot's commands decide what the names in a workspace mean and may change that at any moment. A path is therefore walked one
component at a time, from one open directory to the next, and links are read and followed here: the kernel is never asked to
resolve more than one name. The view is that of the box: links to `/workspace/...` work, all others that leave are refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox_image.box.blueprint import SlotDirectory
from sandbox_image.errors import OutsideWorkspaceError, ToolError
from sandbox_image.protocol import WORKSPACE

MAX_PATH_CHARACTERS = 4096
MAX_COMPONENTS = 512
"""Names passed on the way to a file, those of links included."""
MAX_LINKS = 40
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NAME = WORKSPACE.removeprefix("/")


class WorkspaceFiles:
    """The files of one slot, by the paths that its commands use."""

    def __init__(self, place: SlotDirectory) -> None:
        self._place = place

    @contextmanager
    def file(self, path: str) -> Iterator[tuple[int, os.stat_result]]:
        """A regular file, open for reading, and what it is.

        Raises:
            OutsideWorkspaceError: the path leads out, or to something that is not a regular file.
            OSError: as `open` does.
        """
        with self.parent(path) as (directory, name):
            # A FIFO would block without O_NONBLOCK; a terminal could become ours without O_NOCTTY.
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
        """The open directory that holds the last component of a path, and that component's name, which is not a link.

        `create` makes directories that are missing on the way, for the slot's user.

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
        """Give something that the server made to the slot's user."""
        if self._place.uid is not None:
            os.fchown(descriptor, self._place.uid, self._place.uid)

    def _walk(self, path: str, create: bool) -> tuple[int, str]:
        pending = deque(_NAME.split("/") if not path.startswith("/") else [])
        pending.extend(self._parts(path))
        passed: list[str] = []
        links = 0
        steps = 0
        here = os.open(self._place.root, DIRECTORY_FLAGS)
        try:
            while pending:
                name = pending.popleft()
                steps += 1
                if steps > MAX_COMPONENTS:
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
                if name == "..":
                    passed = passed[:-1]
                    here = self._swap(here, self._descend(passed))
                    continue
                if not passed and name != _NAME:
                    raise OutsideWorkspaceError(f"{path}: outside of the workspace")
                target = _link_target(name, here)
                if target is not None:
                    links += 1
                    if links > MAX_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    pending.extendleft(reversed(self._parts(target)))
                    if target.startswith("/"):
                        passed = []
                        here = self._swap(here, self._descend(passed))
                    continue
                if not pending:
                    return here, name
                here = self._swap(here, self._enter(name, here, create))
                passed.append(name)
            if not passed:
                raise OutsideWorkspaceError(f"{path}: outside of the workspace")
        except BaseException:
            os.close(here)
            raise
        return here, "."

    def _parts(self, path: str) -> list[str]:
        if "\0" in path or len(path) > MAX_PATH_CHARACTERS:
            raise ToolError("path: contains a NUL character" if "\0" in path else f"path: longer than {MAX_PATH_CHARACTERS}")
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            raise ToolError("path: contains a lone surrogate") from None
        # Commands that run without a sandbox see the workspace under another name.
        if f"{path}/".startswith(f"{self._place.seen_as}/"):
            path = WORKSPACE + path.removeprefix(self._place.seen_as)
        return [part for part in path.split("/") if part not in ("", ".")]

    def _descend(self, names: list[str]) -> int:
        here = os.open(self._place.root, DIRECTORY_FLAGS)
        for name in names:
            try:
                here = self._swap(here, self._enter(name, here, False))
            except OSError:
                os.close(here)
                raise
        return here

    def _enter(self, name: str, here: int, create: bool) -> int:
        try:
            return os.open(name, DIRECTORY_FLAGS, dir_fd=here)
        except FileNotFoundError:
            if not create:
                raise
        try:
            os.mkdir(name, 0o755, dir_fd=here)
        except FileExistsError:
            return os.open(name, DIRECTORY_FLAGS, dir_fd=here)
        made = os.open(name, DIRECTORY_FLAGS, dir_fd=here)
        self.adopt(made)
        return made

    @staticmethod
    def _swap(old: int, new: int) -> int:
        os.close(old)
        return new


def _link_target(name: str, directory: int) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise
