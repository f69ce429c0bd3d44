"""Frozen workspaces, from which new ones start."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox_image.errors import RequestError
from sandbox_image.protocol import ErrorKind
from sandbox_image.storage.trash import Trash

FILES = "files"
"""The directory of a layer's own files, in the layer's directory."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(eq=False)
class FrozenLayer:
    """A frozen workspace: its own files, which lie in a directory with a number, upon those of `base`.

    `evictable` ones may go when there is no room; `references` counts the slots and layers that stand on it.
    """

    name: str
    number: int
    base: FrozenLayer | None
    size: int
    evictable: bool
    last_use: int
    references: int = 0
    listed: bool = True

    def is_unused(self) -> bool:
        """Whether it may go when there is no room."""
        return self.evictable and self.listed and self.references == 0

    def chain(self) -> list[FrozenLayer]:
        """This layer and all below it, from the top."""
        chain = []
        layer: FrozenLayer | None = self
        while layer is not None:
            chain.append(layer)
            layer = layer.base
        return chain


class Layers:
    """The layers of a server, by name, and how much room they may take."""

    def __init__(self, directory: Path, trash: Trash, max_bytes: int) -> None:
        self._directory = directory
        self._trash = trash
        self._max_bytes = max_bytes
        self._layers: dict[str, FrozenLayer] = {}
        self._claimed: set[str] = set()
        self._numbers = itertools.count(1)
        self._clock = itertools.count(1)
        self.size = 0

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._layers)

    def use(self, name: str) -> FrozenLayer:
        """A layer, which stays until `leave` has been called as often as `use`.

        Raises:
            RequestError: there is no such layer, or none any more.
        """
        layer = self._layers.get(name)
        if layer is None:
            raise RequestError(ErrorKind.NOT_FOUND, f"no layer {name!r}")
        layer.references += 1
        layer.last_use = next(self._clock)
        return layer

    def leave(self, layer: FrozenLayer | None) -> None:
        """The opposite of `use`; nothing for None."""
        if layer is None:
            return
        layer.references -= 1
        if not layer.listed:
            self._remove_unused(layer)
        self.make_room()

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Keep a name from others while the layer is made that is to have it.

        Raises:
            RequestError: it is not a name, or it is taken.
        """
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise RequestError(ErrorKind.BAD_REQUEST, "field 'name' must be 1 to 128 of the characters A-Z a-z 0-9 . _ -")
        if name in self._layers or name in self._claimed:
            raise RequestError(ErrorKind.BAD_REQUEST, f"there is a layer {name!r} already")
        self._claimed.add(name)
        try:
            yield
        finally:
            self._claimed.discard(name)

    def reserve(self) -> int:
        """The number of a new directory, that is to become a layer or else to be given to `give_up`."""
        number = next(self._numbers)
        self.path(number).mkdir(mode=0o700)
        return number

    def give_up(self, number: int) -> None:
        """Delete a directory that does not become a layer."""
        self._trash.take(self.path(number))

    def path(self, number: int) -> Path:
        """The directory with a number."""
        return self._directory / str(number)

    def add(self, name: str, number: int, base: FrozenLayer | None, size: int, *, evictable: bool) -> FrozenLayer:
        """A directory has become a layer. Whoever made it uses it."""
        layer = FrozenLayer(name, number, base, size, evictable, next(self._clock), references=1)
        if base is not None:
            base.references += 1
        self._layers[name] = layer
        self.size += size
        self.make_room()
        return layer

    def delete(self, name: str) -> None:
        """Remove a layer; its files go when nothing stands on them any more.

        Raises:
            RequestError: there is no such layer.
        """
        layer = self._layers.get(name)
        if layer is None:
            raise RequestError(ErrorKind.NOT_FOUND, f"no layer {name!r}")
        self._unlist(layer)

    def make_room(self, size: int = 0) -> bool:
        """Evict those that have not been used for longest until there is room for `size` more bytes; False if there is not.

        What stands below a slot or another layer stays.
        """
        if self.size + size <= self._max_bytes:
            return True
        unused = [(layer.last_use, layer) for layer in self._layers.values() if layer.is_unused()]
        heapq.heapify(unused)
        while unused and self.size + size > self._max_bytes:
            layer = heapq.heappop(unused)[1]
            self._unlist(layer)
            if layer.base is not None and layer.base.is_unused():
                heapq.heappush(unused, (layer.base.last_use, layer.base))
        return self.size + size <= self._max_bytes

    def _unlist(self, layer: FrozenLayer) -> None:
        del self._layers[layer.name]
        layer.listed = False
        self._remove_unused(layer)

    def _remove_unused(self, layer: FrozenLayer | None) -> None:
        while layer is not None and layer.references == 0 and not layer.listed:
            self.size -= layer.size
            self._trash.take(self.path(layer.number))
            layer = layer.base
            if layer is not None:
                layer.references -= 1
