"""The boxes of one slot: the one in use, and one that has been started ahead of the next reset."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from sandbox_image.box.blueprint import Blueprint, SlotDirectory
from sandbox_image.box.box import Box
from sandbox_image.errors import BoxError

START_AHEAD_AFTER_S = 0.1
"""How long a box that is started ahead leaves the machine to the first calls of the trajectory that has just begun."""

_LOG = logging.getLogger(__name__)


class Boxes:
    """Gives a slot boxes in which nothing has run yet.

    A box is started around a place where nothing is mounted; what is mounted there later appears in it. So a box can wait at
    another place than the one in use, and a reset is a mount. The place of a box is used again when the box is dead: what is
    mounted for the next one never appears in it.
    """

    def __init__(
        self, blueprint: Blueprint, places: tuple[SlotDirectory, SlotDirectory], starts: asyncio.Semaphore, *, ahead: bool
    ) -> None:
        """`starts` limits how many boxes are started ahead at a time, `ahead` says whether that can be done at all."""
        self._blueprint = blueprint
        self._places = list(places)
        self._starts = starts
        self._ahead = ahead
        self._box: Box | None = None
        self._network = False
        self._outgoing: Box | None = None
        self._spare: Box | None = None
        self._spare_network = False
        self._starting: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @property
    def place(self) -> SlotDirectory:
        """Where the workspace of the box in use is, or is to be mounted."""
        return self._places[0]

    @property
    def box(self) -> Box | None:
        """The box in use, dead or alive."""
        return self._box

    def doom(self, reason: str) -> None:
        """Kill the box in use, without waiting for it."""
        if self._box is not None:
            self._box.doom(reason)

    def dismiss(self) -> None:
        """Kill the box that was in use before, without waiting for it."""
        if self._outgoing is not None:
            self._outgoing.doom("the slot was reset")

    async def vacate(self, *, network: bool) -> None:
        """Choose the box to be used next, and its place. Nothing that ran in the slot before can reach it.

        A box that is to be dismissed may still be running afterwards.

        Raises:
            BoxError: what runs in the slot does not die.
        """
        if self._is_fresh(network):
            return
        spare = await self._take_spare(network)
        if spare is not None:
            self._outgoing, self._box = self._box, spare
            self._places.reverse()
        elif self._box is not None:
            await self._box.kill("the slot was reset")
            self._box = None

    async def occupy(self, *, network: bool) -> Box:
        """The chosen box, started if it is not running.

        Raises:
            BoxError: it cannot be started.
        """
        if self._box is None:
            self._box = await Box.start(self._blueprint, self.place, network=network)
        self._network = network
        return self._box

    def start_ahead(self, clear: Callable[[], None], *, network: bool) -> None:
        """Let a box be started for the next reset; `clear` is called when its place is used by nobody any more."""
        if not self._ahead or (self._starting is not None and not self._starting.done()):
            return
        if self._spare is None or not self._spare.alive or self._spare_network != network:
            self._hurry.clear()
            self._starting = asyncio.create_task(self._start_spare(clear, network))

    async def close(self) -> None:
        """Kill everything.

        Raises:
            BoxError: something does not die.
        """
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        for box in (self._box, self._outgoing, self._spare):
            if box is not None:
                await box.kill("the server stops")

    def _is_fresh(self, network: bool) -> bool:
        box = self._box
        return self._ahead and box is not None and not box.used and box.still_runs() and self._network == network

    async def _take_spare(self, network: bool) -> Box | None:
        if self._starting is not None:
            self._hurry.set()
            await asyncio.wait([self._starting])
        spare = self._spare
        if spare is None or not spare.still_runs() or self._spare_network != network:
            return None
        self._spare = None
        return spare

    async def _start_spare(self, clear: Callable[[], None], network: bool) -> None:
        try:
            if self._outgoing is not None:
                await self._outgoing.kill("the slot was reset")
                self._outgoing = None
            if self._spare is not None:
                await self._spare.kill("it is of no use")
                self._spare = None
            clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(START_AHEAD_AFTER_S):
                    await self._hurry.wait()
            async with self._starts:
                self._spare = await Box.start(self._blueprint, self._places[1], network=network)
            self._spare_network = network
        except BoxError as error:
            # What runs in the slot may be in the way, as its processes and memory count as well. The next reset ends that.
            _LOG.info("no box could be started ahead: %s", error)
