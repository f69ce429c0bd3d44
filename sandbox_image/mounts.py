"""The server's own view of the file system, in which the users of slots can reach what they must see.

A slot's user is nobody in particular and cannot pass a directory such as /root, although its box is to show a tree below it.
A server with the privilege therefore takes a mount namespace of its own and binds these trees at a place that everybody can
reach. Nobody else sees that namespace, and its mounts vanish with the last process in it.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from sandbox_image.errors import StartupError

_CLONE_NEWNS = 0x00020000
_MS_BIND = 0x1000
_MS_MOVE = 0x2000
_MS_REC = 0x4000
_MS_SLAVE = 0x80000
_STANDARD_DIRECTORIES = ("/mnt", "/media", "/srv", "/opt")


class Stage:
    """Where each tree that a box shows can be reached by the user of a slot."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources

    def source(self, tree: str) -> str:
        """The path to hand to bubblewrap for a tree that the stage was set up with."""
        return self._sources[tree]

    @classmethod
    def plain(cls, trees: Sequence[str]) -> Stage:
        """Every tree at its own path."""
        return cls({tree: tree for tree in trees})

    @classmethod
    def set_up(cls, trees: Sequence[str], scratch: Path, *, keep: Sequence[str]) -> Stage:
        """Make the trees reachable for everybody in this process and those that it starts from now on.

        Must be called as root, before there is a second thread. `scratch` is a path where an empty directory may stand for a
        moment; no directory of `keep` is covered by a mount.

        Raises:
            StartupError: a mount namespace is refused, and a tree cannot be reached without one.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) != 0:
            return cls._without_namespace(trees, os.strerror(ctypes.get_errno()))
        # Mounts of the machine still arrive here, ours do not leave.
        _mount(libc, "none", "/", None, _MS_REC | _MS_SLAVE, None)
        place = next((path for path in _STANDARD_DIRECTORIES if _may_be_covered(path, keep)), None)
        if place is None:
            raise StartupError(f"none of {', '.join(_STANDARD_DIRECTORIES)} is a directory that may be covered by a mount")
        scratch.mkdir(mode=0o700)
        try:
            _mount(libc, "stage", str(scratch), "tmpfs", 0, "mode=0711,size=1m")
            sources = {}
            for number, tree in enumerate(trees):
                point = scratch / str(number)
                if os.path.isdir(tree):
                    point.mkdir()
                else:
                    point.touch()
                _mount(libc, tree, str(point), None, _MS_BIND | _MS_REC, None)
                sources[tree] = f"{place}/{number}"
            _mount(libc, str(scratch), place, None, _MS_MOVE, None)
        finally:
            scratch.rmdir()
        return cls(sources)

    @classmethod
    def _without_namespace(cls, trees: Sequence[str], reason: str) -> Stage:
        for tree in trees:
            barrier = _barrier(tree)
            if barrier is not None:
                raise StartupError(
                    f"slots cannot reach {tree}: {barrier} is closed to others, and a mount namespace is refused ({reason}); "
                    f"use a tree that every user can read, or run the server with CAP_SYS_ADMIN or as an ordinary user"
                )
        return cls.plain(trees)


def _may_be_covered(path: str, keep: Sequence[str]) -> bool:
    return os.path.isdir(path) and not any(os.path.realpath(kept).startswith(f"{path}/") for kept in keep)


def _barrier(tree: str) -> str | None:
    """The first directory on the way to a tree that users without special rights cannot pass."""
    path = Path(os.path.realpath(tree))
    for directory in reversed(path.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return str(directory)
    return None


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    if libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) != 0:
        raise StartupError(f"cannot mount {source} at {target}: {os.strerror(ctypes.get_errno())}")
