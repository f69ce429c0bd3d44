"""Layers: frozen workspaces, from which new ones start."""

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
"""The name of the directory with a layer's own files, in the layer directory."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(eq=False)
class FrozenLayer:
    """A frozen workspace: its own files, in the layer directory `number`, on top of those of `base`.

    `references` counts the slots and layers that use it. An `evictable` one without references may be deleted to make room.
    A deleted one is not `listed`; its files stay as long as it has references.
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
        """Whether it may be deleted to make room."""
        return self.evictable and self.listed and self.references == 0

    def chain(self) -> list[FrozenLayer]:
        """This layer and all below it, the uppermost first."""
        chain = []
        layer: FrozenLayer | None = self
        while layer is not None:
            chain.append(layer)
            layer = layer.base
        return chain


class Layers:
    """The layers of a server by name, with reference counts, least recently used eviction and a limit of their size."""

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
        """Take a reference to a layer, which keeps its files; `leave` gives it back.

        Raises:
            RequestError: there is no such layer.
        """
        layer = self._layers.get(name)
        if layer is None:
            raise RequestError(ErrorKind.NOT_FOUND, f"no layer {name!r}")
        layer.references += 1
        layer.last_use = next(self._clock)
        return layer

    def leave(self, layer: FrozenLayer | None) -> None:
        """Give a reference back; does nothing for None."""
        if layer is None:
            return
        layer.references -= 1
        if not layer.listed:
            self._delete_unused(layer)
        self.make_room()

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Reserve a name while its layer is being made.

        Raises:
            RequestError: it is not a valid name, or it is taken.
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
        """Make a layer directory and return its number, for `add` or `give_up`."""
        number = next(self._numbers)
        self.path(number).mkdir(mode=0o700)
        return number

    def give_up(self, number: int) -> None:
        """Delete a layer directory that does not become a layer."""
        self._trash.take(self.path(number))

    def path(self, number: int) -> Path:
        """The layer directory with a number."""
        return self._directory / str(number)

    def add(self, name: str, number: int, base: FrozenLayer | None, size: int, *, evictable: bool) -> FrozenLayer:
        """Make a layer directory a layer; the caller gets a reference to it."""
        layer = FrozenLayer(name, number, base, size, evictable, next(self._clock), references=1)
        if base is not None:
            base.references += 1
        self._layers[name] = layer
        self.size += size
        self.make_room()
        return layer

    def delete(self, name: str) -> None:
        """Delete a layer; its files are deleted with the last reference.

        Raises:
            RequestError: there is no such layer.
        """
        layer = self._layers.get(name)
        if layer is None:
            raise RequestError(ErrorKind.NOT_FOUND, f"no layer {name!r}")
        self._unlist(layer)

    def make_room(self, size: int = 0) -> bool:
        """Delete the least recently used of the unused layers until `size` more bytes fit; whether they do."""
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
        self._delete_unused(layer)

    def _delete_unused(self, layer: FrozenLayer | None) -> None:
        while layer is not None and layer.references == 0 and not layer.listed:
            self.size -= layer.size
            self._trash.take(self.path(layer.number))
            layer = layer.base
            if layer is not None:
                layer.references -= 1
