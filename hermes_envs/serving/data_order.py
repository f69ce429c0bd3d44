"""The order in which a trainer gets an environment's items, so that a run can go on where another ended."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hermes_envs.errors import ConfigError

Position = Any
"""Anything that JSON can say, but None: where an environment is in its items."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """An item that was taken, and the position before it, from which it can be taken again."""

    item: Any
    position: Position | None


class DataOrder:
    """Takes an environment's items and remembers from where.

    `position` gives None for an environment whose items cannot be taken again; of such a one nothing is saved.
    """

    def __init__(
        self,
        next_item: Callable[[], Awaitable[Any]],
        position: Callable[[], Position | None],
        move_to: Callable[[Position], None],
    ) -> None:
        self._next_item = next_item
        self._position = position
        self._move_to = move_to
        self._unfinished: deque[Ticket] = deque()

    async def take(self) -> Ticket | None:
        """The next item; first those that an earlier run left unfinished. None when there are no more."""
        if self._unfinished:
            return self._unfinished.popleft()
        position = self._position()
        item = await self._next_item()
        return None if item is None else Ticket(item, position)

    async def save(self, path: Path, unfinished: Iterable[Ticket]) -> None:
        """Write down where the order is, and the items taken before that nothing came of yet.

        Raises:
            OSError: the file cannot be written.
        """
        if (position := self._position()) is None:
            return
        # Once for each group, whatever it has become.
        tickets = dict.fromkeys([*unfinished, *self._unfinished])
        content = json.dumps({"position": position, "unfinished": [ticket.position for ticket in tickets]})
        await asyncio.to_thread(_replace, path, content)

    async def restore(self, folder: Path, name: str, step: int) -> Path | None:
        """Go on from the newest file that is not from after a step; which one, or None if there is none.

        Raises:
            ConfigError: the file is none that `save` wrote.
        """
        path = await asyncio.to_thread(_newest, folder, name, step)
        if path is None:
            return None
        try:
            saved = json.loads(await asyncio.to_thread(path.read_text))
            position, unfinished = saved["position"], list(saved["unfinished"])
        except (OSError, ValueError, TypeError, KeyError) as reason:
            raise ConfigError(f"checkpoint_dir: {path} cannot be read ({reason!r}); move it away to begin anew") from reason
        for earlier in unfinished:
            self._move_to(earlier)
            self._unfinished.append(Ticket(await self._next_item(), earlier))
        self._move_to(position)
        return path


def checkpoint_path(folder: Path, name: str, step: int) -> Path:
    """Where the order at a step is saved; named as atroposlib does."""
    return folder / name / f"step-{step}.json"


def _newest(folder: Path, name: str, step: int) -> Path | None:
    """Of all that were registered under the same name, for an environment that comes back alone gets the next number.

    Among equals its own.
    """
    namesakes = re.compile(rf"{re.escape(re.sub(r'_[0-9]+$', '', name))}_[0-9]+")
    found = [
        (int(path.stem[5:]), path.parent.name == name, path)
        for path in folder.glob("*/step-*.json")
        if namesakes.fullmatch(path.parent.name) and path.stem[5:].isdecimal() and int(path.stem[5:]) <= step
    ]
    return max(found)[-1] if found else None


def _replace(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(content)
    os.replace(unfinished, path)
