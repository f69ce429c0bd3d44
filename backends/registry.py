"""Classes that are chosen by name: built-in ones, and those of other packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Generic, TypeVar

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Registry(Generic[Kind]):
    """The subclasses of a class that an option can name.

    A name is one of `built_in` (name -> `package.module:Class`), that of an entry point of `group` in an installed package, or
    `package.module:Class` itself. Built-in names are known without metadata, so that a checkout need not be installed; they
    cannot be taken by another package.
    """

    kind: Callable[[], type[Kind]]
    """Gives the class of which all are subclasses, when one is loaded."""
    group: str
    option: str
    built_in: Mapping[str, str]
    error: type[Exception]
    """What is raised for a name that means nothing."""

    def names(self) -> list[str]:
        """All names, without those of the form `package.module:Class`."""
        return sorted({*self.built_in, *(point.name for point in importlib.metadata.entry_points(group=self.group))})

    def find(self, name: str) -> EntryPoint:
        """Where the class of that name is; nothing is imported yet.

        Raises:
            error: there is no such name.
        """
        if name in self.built_in or ":" in name:
            return EntryPoint(name, self.built_in.get(name, name), self.group)
        for point in importlib.metadata.entry_points(group=self.group, name=name):
            return point
        known = ", ".join(self.names())
        raise self.error(f"{self.option}: {name!r} is not available in this version; available: {known}")

    def load(self, name: str) -> type[Kind]:
        """The class of that name.

        Raises:
            error: there is no such name, it cannot be imported, or it is something else.
        """
        point = self.find(name)
        try:
            found = point.load()
        except (ImportError, AttributeError) as reason:
            raise self.error(f"{self.option}: {name!r} cannot be imported: {reason}") from reason
        kind = self.kind()
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise self.error(f"{self.option}: {name!r} is no subclass of {kind.__name__}")
        return found
