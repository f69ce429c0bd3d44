"""The server's own view of the file system, in which the users of slots can reach what they must see.

A slot's user is nobody in particular and cannot pass a directory such as /root, although its box is to show a tree below it.
A server with the privilege therefore takes a mount namespace of its own and binds these trees at a place that everybody can
reach. Nobody else sees that namespace, and its mounts vanish with the last process in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from sandbox_image.errors import StartupError
from sandbox_image.kernel import linux

_STANDARD_DIRECTORIES = ("/mnt", "/media", "/srv", "/opt")


class SharedTrees:
    """Where each tree that a box shows can be reached by the user of a slot."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources

    def source(self, tree: str) -> str:
        """The path to hand to bubblewrap for a tree that the stage was set up with."""
        return self._sources[tree]

    @classmethod
    def plain(cls, trees: Sequence[str]) -> SharedTrees:
        """Every tree at its own path."""
        return cls({tree: tree for tree in trees})

    @classmethod
    def set_up(cls, trees: Sequence[str], scratch: Path, *, keep: Sequence[str]) -> SharedTrees:
        """Make the trees reachable for everybody in this process and those that it starts from now on.

        Must be called as root, before there is a second thread. `scratch` is a path where an empty directory may stand for a
        moment; no directory of `keep` is covered by a mount.

        Raises:
            StartupError: a mount namespace is refused, and a tree cannot be reached without one.
        """
        try:
            linux.enter_own_mounts()
        except OSError as error:
            return cls._without_namespace(trees, os.strerror(error.errno or 0))
        place = next((path for path in _STANDARD_DIRECTORIES if _may_be_covered(path, keep)), None)
        if place is None:
            raise StartupError(f"none of {', '.join(_STANDARD_DIRECTORIES)} is a directory that may be covered by a mount")
        try:
            return cls(cls._bind(trees, scratch, place))
        except OSError as error:
            raise StartupError(f"cannot show what slots need: {error.strerror}") from error

    @staticmethod
    def _bind(trees: Sequence[str], scratch: Path, place: str) -> dict[str, str]:
        scratch.mkdir(mode=0o700)
        try:
            linux.mount("stage", str(scratch), "tmpfs", options="mode=0711,size=1m")
            sources = {}
            for number, tree in enumerate(trees):
                point = scratch / str(number)
                if os.path.isdir(tree):
                    point.mkdir()
                else:
                    point.touch()
                linux.mount(tree, str(point), flags=linux.MS_BIND | linux.MS_REC)
                sources[tree] = f"{place}/{number}"
            linux.mount(str(scratch), place, flags=linux.MS_MOVE)
        finally:
            scratch.rmdir()
        return sources

    @classmethod
    def _without_namespace(cls, trees: Sequence[str], reason: str) -> SharedTrees:
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
