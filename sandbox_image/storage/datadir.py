"""The data directory of a slot server, with its workspaces and layers."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from sandbox_image.errors import StartupError
from sandbox_image.kernel.cgroups import remove_recorded
from sandbox_image.storage.trees import remove_tree

_MARKER = ".slot-server"
_GROUPS = "cgroups"
_OWN = ("slots", "layers", "trash", "stage", "views", "scratch", "trial")


class DataDir:
    """Belongs to one server at a time, by a lock. The server empties it before and after, except for files of others."""

    def __init__(self, path: Path, lock: int, created: bool) -> None:
        self.path = path
        self.layers = path / "layers"
        self.trash = path / "trash"
        self.groups = path / _GROUPS
        self._lock = lock
        self._created = created

    @classmethod
    def claim(cls, path: Path) -> DataDir:
        """Lock the directory, and remove what a killed server has left in it.

        Raises:
            StartupError: another server uses it, it contains foreign files of the same names, or it cannot be written.
        """
        try:
            return cls._claim(path.absolute())
        except OSError as error:
            raise StartupError(f"--data-dir {path}: {error.strerror}") from error

    @classmethod
    def _claim(cls, path: Path) -> DataDir:
        created = not path.exists()
        # The users of slots can pass, but not list it.
        path.mkdir(mode=0o711, parents=True, exist_ok=True)
        marker = path / _MARKER
        if not marker.exists():
            foreign = [name for name in (*_OWN, _GROUPS) if (path / name).exists()]
            if foreign:
                raise StartupError(f"--data-dir {path}: {foreign[0]} in it is not a slot server's; use an empty directory")
        lock = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StartupError(f"--data-dir {path}: another slot server uses it") from None
        claimed = cls(path, lock, created)
        remove_recorded(claimed.groups)
        for name in _OWN:
            remove_tree(path / name)
        claimed.layers.mkdir(mode=0o700)
        claimed.trash.mkdir(mode=0o700)
        return claimed

    @classmethod
    def remove_abandoned(cls, path: Path) -> bool:
        """Remove the directory of a server that was killed with its parent; False if it is in use, or no data directory.

        Raises:
            OSError: something in it belongs to somebody else.
        """
        try:
            lock = os.open(path / _MARKER, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            cls.remove(path)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    @staticmethod
    def remove(path: Path) -> None:
        """Remove the directory of a server that does not run any more, and its control groups.

        Raises:
            OSError: something in it belongs to somebody else, or is still in use.
        """
        remove_recorded(path / _GROUPS)
        remove_tree(path)

    def release(self, *, with_parent: bool = False) -> None:
        """Remove what the server has made: also the directory, if the server made it, or `with_parent` its dead parent did.

        Foreign directories in it are removed only if they are empty.
        """
        remove_recorded(self.groups)
        for name in (*_OWN, _MARKER):
            remove_tree(self.path / name)
        os.close(self._lock)
        if not self._created and not with_parent:
            return
        for directory in (*(path for path in self.path.iterdir() if path.is_dir() and not path.is_symlink()), self.path):
            try:
                directory.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
