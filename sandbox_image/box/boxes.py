"""The boxes of one slot: the one in use, and a spare one, started ahead of the next reset."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from sandbox_image.box.blueprint import Blueprint, BoxLimits, SlotDirectory
from sandbox_image.box.box import Box
from sandbox_image.errors import BoxError

START_AHEAD_AFTER_S = 0.1
"""The start of a spare box waits so long, so that it does not compete with the first calls of a trajectory."""

_LOG = logging.getLogger(__name__)


class Boxes:
    """Gives a slot boxes in which no command has run yet.

    A box is started around an empty mount point; a workspace that is mounted there later appears in the box. The spare box
    waits around the mount point of the slot's other directory, so that a reset only mounts a workspace. A directory is used
    again after the death of its box: no box ever sees the workspace of the next one.
    """

    def __init__(
        self, blueprint: Blueprint, directories: tuple[SlotDirectory, SlotDirectory], starts: asyncio.Semaphore, *, ahead: bool
    ) -> None:
        """`starts` limits how many spare boxes start at a time; without `ahead` there are no spare boxes."""
        self._blueprint = blueprint
        self._directories = list(directories)
        self._starts = starts
        self._ahead = ahead
        self._box: Box | None = None
        self._limits: BoxLimits | None = None
        self._previous: Box | None = None
        self._spare: Box | None = None
        self._spare_limits: BoxLimits | None = None
        self._starting: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @property
    def directory(self) -> SlotDirectory:
        """The directory of the box in use, or of the one that is to be used next."""
        return self._directories[0]

    @property
    def box(self) -> Box | None:
        """The box in use, dead or alive."""
        return self._box

    def doom(self, reason: str) -> None:
        """Kill the box in use, without waiting for its end."""
        if self._box is not None:
            self._box.doom(reason)

    def doom_previous(self) -> None:
        """Kill the box that was in use before the last `vacate`, without waiting for its end."""
        if self._previous is not None:
            self._previous.doom("the slot was reset")

    async def vacate(self, limits: BoxLimits) -> None:
        """Choose the directory and, if there is one, the box to be used next; no process of the slot so far can reach it.

        The box in use is either dead afterwards or waits for `doom_previous`.

        Raises:
            BoxError: the box in use does not die.
        """
        if self._is_fresh(limits):
            return
        spare = await self._take_spare(limits)
        if spare is not None:
            self._previous, self._box = self._box, spare
            self._directories.reverse()
        elif self._box is not None:
            await self._box.kill("the slot was reset")
            self._box = None

    async def kill(self, reason: str) -> None:
        """Kill all boxes of the slot.

        Raises:
            BoxError: one does not die.
        """
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        for box in (self._box, self._previous, self._spare):
            if box is not None:
                await box.kill(reason)
        self._box = self._previous = self._spare = None

    async def occupy(self, limits: BoxLimits) -> Box:
        """The chosen box, which is started if there was none.

        Raises:
            BoxError: it cannot be started.
        """
        if self._box is None:
            self._box = await self._start(self.directory, limits)
        self._limits = limits
        return self._box

    def start_ahead(self, clear: Callable[[], None], limits: BoxLimits) -> None:
        """Start a spare box in the background; `clear` is called when no box uses its directory any more."""
        if not self._ahead or (self._starting is not None and not self._starting.done()):
            return
        if self._spare is None or not self._spare.alive or self._spare_limits != limits:
            self._hurry.clear()
            self._starting = asyncio.create_task(self._start_spare(clear, limits))

    async def _start(self, directory: SlotDirectory, limits: BoxLimits) -> Box:
        return await Box.start(self._blueprint.with_memory(limits.memory_bytes), directory, network=limits.network)

    def _is_fresh(self, limits: BoxLimits) -> bool:
        box = self._box
        return self._ahead and box is not None and not box.used and box.still_runs() and self._limits == limits

    async def _take_spare(self, limits: BoxLimits) -> Box | None:
        if self._starting is not None:
            self._hurry.set()
            await asyncio.wait([self._starting])
        spare = self._spare
        if spare is None or not spare.still_runs() or self._spare_limits != limits:
            return None
        self._spare = None
        return spare

    async def _start_spare(self, clear: Callable[[], None], limits: BoxLimits) -> None:
        try:
            if self._previous is not None:
                await self._previous.kill("the slot was reset")
                self._previous = None
            if self._spare is not None:
                await self._spare.kill("it was started with other limits")
                self._spare = None
            clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(START_AHEAD_AFTER_S):
                    await self._hurry.wait()
            async with self._starts:
                self._spare = await self._start(self._directories[1], limits)
            self._spare_limits = limits
        except BoxError as error:
            # The limits of the slot may be used up by its processes; the next reset kills them.
            _LOG.info("no box could be started ahead: %s", error)
