"""Finished groups on their way to a trainer."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.teardown import finish
from hermes_envs.serving.data_order import Ticket
from hermes_envs.serving.rollout_api import POST_TIMEOUT_S, RolloutApi

Item = dict[str, Any]
"""atroposlib's `ScoredDataGroup`: what the API takes at once."""


@dataclass(frozen=True)
class Parcel:
    """One item, being packed or packed in a thread, and the ticket of the group that it is from."""

    ticket: Ticket
    packed: asyncio.Future[bytes]


class Outbox:
    """Keeps each item until a trainer has had it, for the API has everything in memory and may be restarted.

    The API makes as many batches as it can at once, a step each, out of its queue in order; then it gives a trainer the last
    of them first, and makes more when it has no more. So the items of the latest batches are kept beside those in its queue.

    An item arrives at least once. It arrives twice where the API dies, or its answer is lost, in the moment after it took the
    item.
    """

    def __init__(self, api: RolloutApi) -> None:
        self._api = api
        self._waiting: deque[Parcel] = deque()
        self._queued: deque[Parcel] = deque()
        self._batched: list[Parcel] = []
        self._step = self._batches = 0

    @property
    def waiting(self) -> int:
        """How many items the API does not have yet."""
        return len(self._waiting)

    @property
    def unbatched(self) -> int:
        """How many items no batch was made of yet."""
        return len(self._queued) + len(self._waiting)

    @property
    def batches(self) -> int:
        """How many of the latest batches a trainer may not have had."""
        return self._batches

    def tickets(self, step: int) -> list[Ticket]:
        """Of what a trainer has not had that has had `step` batches, oldest first."""
        return [parcel.ticket for parcel in (*self._not_had(step), *self._queued, *self._waiting)]

    def add(self, ticket: Ticket, items: Sequence[Item]) -> None:
        """Take a finished group. There is nothing to await: whatever is cancelled, it is in the box."""
        loop = asyncio.get_running_loop()
        self._waiting.extend(Parcel(ticket, loop.run_in_executor(None, _pack, item)) for item in items)

    async def send(self, env_id: int, timeout_s: float = POST_TIMEOUT_S) -> None:
        """Hand over what waits, oldest first.

        Raises:
            UnknownEnvironmentError: the API does not know `env_id`.
            RolloutApiError: as `RolloutApi.post_group`. Whatever was not taken goes on waiting.
        """
        while self._waiting:
            await finish(self._send_oldest(env_id, timeout_s))

    async def _send_oldest(self, env_id: int, timeout_s: float) -> None:
        parcel = self._waiting[0]
        packed = await parcel.packed
        # An API that was restarted is spoilt for its trainer by what it gets before the trainer has registered.
        await self._api.status(env_id)
        # A gzip file is any number of compressed parts in a row.
        beginning = gzip.compress(f'{{"env_id": {env_id}, '.encode())
        await self._api.post_group(beginning + packed, timeout_s)
        self._queued.append(self._waiting.popleft())

    def note_queue(self, length: int, step: int) -> None:
        """The API still has the last `length` items in its queue, and has made batches up to `step`."""
        taken = [self._queued.popleft() for _ in range(len(self._queued) - length)]
        if step != self._step:
            self._batched, self._batches, self._step = taken, step - self._step, step

    def send_again(self, step: int) -> None:
        """Have everything wait that a trainer has not had that has had `step` batches: the API has lost it."""
        self._waiting.extendleft(reversed([*self._not_had(step), *self._queued]))
        self._queued.clear()
        self._batched, self._batches, self._step = [], 0, step

    def _not_had(self, step: int) -> list[Parcel]:
        """Of the latest batches; the first is given out last."""
        batches = min(self._step - step, self._batches)
        return self._batched[: round(len(self._batched) * batches / self._batches)] if batches > 0 else []

    async def write(self, path: Path) -> None:
        """Append what waits to a file, an item in a line."""
        lines = [b"{" + gzip.decompress(await parcel.packed) for parcel in self._waiting]
        await asyncio.to_thread(_append, path, b"\n".join([*lines, b""]))


def _pack(item: Item) -> bytes:
    """The item's JSON without its opening brace, compressed: a few per cent of the size of its lists."""
    return gzip.compress(json.dumps(item)[1:].encode(), compresslevel=1)


def _append(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)
