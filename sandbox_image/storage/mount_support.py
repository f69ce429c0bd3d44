"""Which mounts a server can make on this host, found out by making them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox_image.kernel import linux
from sandbox_image.storage.trees import remove_tree
from sandbox_image.storage.volumes import Volume, Volumes

_SMALL = {"size": 1 << 20, "inodes": 100}


@dataclass(frozen=True)
class MountSupport:
    """Why the server cannot mount workspaces, and why it cannot stack them on layers by an overlay; None where it can."""

    no_mounts: str | None
    no_overlay: str | None

    @classmethod
    def none(cls, reason: str) -> MountSupport:
        """Neither works."""
        return cls(reason, reason)


def try_out(directory: Path, owner: int | None) -> MountSupport:
    """Try it in a directory that does not exist yet and is removed afterwards, on whose file system the data will lie.

    `owner` is the user of a slot, None if that is the server's. Must be called before there is a second thread.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        # The mounts vanish with this process, which has a mount namespace of its own.
        try:
            support = _try(directory, owner)
        except OSError as error:
            support = MountSupport.none(str(error))
        finally:
            os.write(send, json.dumps(asdict(support)).encode())
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    remove_tree(directory)
    return MountSupport(**json.loads(said)) if said else MountSupport.none("the trial died")


def _try(directory: Path, owner: int | None) -> MountSupport:
    try:
        linux.enter_own_mounts()
        plain = _Trial(directory / "plain", owner, overlay=False)
        with plain.mounted([], None):
            plain.write("file")
    except OSError as error:
        return MountSupport.none(_reason(error))
    try:
        _try_overlay(_Trial(directory / "overlay", owner, overlay=True))
    except OSError as error:
        return MountSupport(None, _reason(error))
    return MountSupport(None, None)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _try_overlay(trial: _Trial) -> None:
    """Make a layer, on it a second one that deletes and replaces files of the first, and on both a workspace."""
    for number in (1, 2):
        (trial.directory / "layers" / str(number)).mkdir()
    with trial.mounted([], 1):
        trial.write("deleted")
        trial.write("replaced/old")
    with trial.mounted([1], 2):
        trial.as_owner(lambda: os.unlink("deleted"))
        trial.as_owner(lambda: shutil.rmtree("replaced"))
        trial.write("replaced/new")
    with trial.mounted([2, 1], None):
        trial.expect({".": ["replaced"], "replaced": ["new"]})
        trial.as_owner(lambda: shutil.rmtree("replaced"))
        trial.write("replaced/newer")
        trial.expect({".": ["replaced"], "replaced": ["newer"]})


class _Trial:
    def __init__(self, directory: Path, owner: int | None, *, overlay: bool) -> None:
        self.directory = directory
        self.point = directory / "point"
        self._owner = owner
        for path in (self.point, directory / "layers"):
            path.mkdir(parents=True)
        self._volumes = Volumes(directory, overlay=overlay, inodes=_SMALL["inodes"])

    @contextmanager
    def mounted(self, layers: list[int], number: int | None) -> Iterator[Volume]:
        """Mount a workspace and make it the current directory."""
        volume = self._volumes.mount(str(self.point), self._owner, layers, number, size=_SMALL["size"])
        # The owner may not be able to pass the directories above it.
        os.chdir(self.point)
        try:
            yield volume
        finally:
            os.chdir("/")
            volume.unmount()
            for descriptor in volume.descriptors:
                os.close(descriptor)

    def write(self, path: str) -> None:
        """Create a file and its parent directory."""

        def write() -> None:
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).touch()

        self.as_owner(write)

    def expect(self, listing: dict[str, list[str]]) -> None:
        """Compare what directories contain, and the owner of that."""
        for path, names in listing.items():
            if os.listdir(path) != names:
                raise OSError(errno.EIO, "an overlay forgets what was deleted in a layer")
            if self._owner is not None and os.stat(Path(path, names[0])).st_uid != self._owner:
                raise OSError(errno.EIO, "an overlay forgets whose files are whose")

    def as_owner(self, work: Callable[[], None]) -> None:
        """Do work as the slot's user."""
        if self._owner is None:
            work()
            return
        os.setegid(self._owner)
        os.seteuid(self._owner)
        try:
            work()
        finally:
            os.seteuid(0)
            os.setegid(0)
