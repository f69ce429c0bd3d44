"""Directories that the users of slots can reach, wherever they lie on the host.

The user of a slot has no rights on the host and cannot pass a directory such as /root, although a box may have to show a tree
below it. A server with the right to mount therefore enters a mount namespace of its own and bind-mounts these trees below a
directory that everybody can pass. No other process sees these mounts, and they vanish with the namespace.
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
    """The path at which the user of a slot reaches each tree that boxes show."""

    def __init__(self, paths: dict[str, str]) -> None:
        self._paths = paths

    def path(self, tree: str) -> str:
        """The path to hand to bubblewrap for one of the trees."""
        return self._paths[tree]

    @classmethod
    def plain(cls, trees: Sequence[str]) -> SharedTrees:
        """Every tree at its own path."""
        return cls({tree: tree for tree in trees})

    @classmethod
    def mounted(cls, trees: Sequence[str], scratch: Path, *, keep: Sequence[str]) -> SharedTrees:
        """Make the trees reachable by every user, in this process and those that it starts from now on.

        Must be called as root, before there is a second thread. `scratch` is a path at which an empty directory is made for a
        moment; no mount covers a path of `keep`.

        Raises:
            StartupError: a mount namespace is refused, and a tree cannot be reached without one.
        """
        try:
            linux.enter_own_mounts()
        except OSError as error:
            return cls._without_namespace(trees, os.strerror(error.errno or 0))
        parent = next((path for path in _STANDARD_DIRECTORIES if _may_be_covered(path, keep)), None)
        if parent is None:
            raise StartupError(f"none of {', '.join(_STANDARD_DIRECTORIES)} is a directory that may be covered by a mount")
        try:
            return cls(cls._bind(trees, scratch, parent))
        except OSError as error:
            raise StartupError(f"cannot show what slots need: {error.strerror}") from error

    @staticmethod
    def _bind(trees: Sequence[str], scratch: Path, parent: str) -> dict[str, str]:
        scratch.mkdir(mode=0o700)
        try:
            linux.mount("shared-trees", str(scratch), "tmpfs", options="mode=0711,size=1m")
            paths = {}
            for number, tree in enumerate(trees):
                point = scratch / str(number)
                if os.path.isdir(tree):
                    point.mkdir()
                else:
                    point.touch()
                linux.mount(tree, str(point), flags=linux.MS_BIND | linux.MS_REC)
                paths[tree] = f"{parent}/{number}"
            linux.mount(str(scratch), parent, flags=linux.MS_MOVE)
        finally:
            scratch.rmdir()
        return paths

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
