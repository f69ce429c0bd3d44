"""The order in which an environment's tasks are taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

from hermes_envs.errors import ConfigError

Task = TypeVar("Task")


class TaskOrder(Generic[Task]):
    """Goes through tasks: once for a file, over and over for a trainer, shuffled anew each time if there is a seed.

    `most` limits it to so many tasks, always the same ones; 0 is all.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int | None, most: int = 0) -> None:
        chosen = list(tasks)
        if seed is not None:
            random.Random(seed).shuffle(chosen)
        self._tasks = chosen[: most or None]
        self._seed = seed
        self.restore_position([0, 0])

    def __len__(self) -> int:
        return len(self._tasks)

    def next(self, *, once: bool) -> Task | None:
        """The next task; None when all have been taken, if they are to be taken once."""
        if self._index == len(self._order):
            if once or not self._order:
                return None
            self.restore_position([self._epoch + 1, 0])
        self._index += 1
        return self._order[self._index - 1]

    @property
    def position(self) -> list[int]:
        """How often all tasks have been taken, and how many since."""
        return [self._epoch, self._index]

    def restore_position(self, position: Sequence[int]) -> None:
        """Go on from where `position` says.

        Raises:
            ConfigError: there is no such place in these tasks.
        """
        match position:
            case [int(epoch), int(index)] if epoch >= 0 and 0 <= index <= len(self._tasks):
                self._epoch, self._index = epoch, index
            case _:
                raise ConfigError(f"checkpoint_dir: {position!r} is no place in {len(self._tasks)} tasks; were they changed?")
        self._order = list(self._tasks)
        if self._seed is not None and self._epoch:
            random.Random(f"{self._seed}-{self._epoch}").shuffle(self._order)
