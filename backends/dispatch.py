"""How calls travel to one sandbox: at once when they can, together when they pile up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from backends.client import SlotServerClient
from backends.codec import EncodedCall
from backends.errors import SandboxError, SandboxUnavailableError
from sandbox_image.protocol import MAX_BATCH_ITEMS, ExecuteRequest, ExecutionResult

_MAX_BATCH_BYTES = 8 << 20


@dataclass(eq=False)
class _Call:
    encoded: EncodedCall
    future: asyncio.Future[ExecutionResult]

    def settle(self, outcome: ExecutionResult | BaseException) -> None:
        if self.future.done():
            return
        if isinstance(outcome, ExecutionResult):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)
            # Looked at here: a caller that is cancelled in this very moment never will, which asyncio would report.
            self.future.exception()


@dataclass(eq=False)
class _Lane:
    """The calls of one slot. Those in `waiting` leave when those under way are done: a slot runs one call at a time anyway."""

    waiting: deque[_Call] = field(default_factory=deque)
    under_way: int = 0


@dataclass(eq=False)
class _Flight:
    """One HTTP request and the calls that travel in it; `open` ones have no outcome yet."""

    calls: list[_Call] = field(default_factory=list)
    size: int = 0
    open: int = 0
    abandoned: bool = False

    def has_room(self, call: _Call, max_calls: int) -> bool:
        fits = len(self.calls) < max_calls and self.size + len(call.encoded.body) <= _MAX_BATCH_BYTES
        return fits or not self.calls

    def add(self, call: _Call) -> None:
        self.calls.append(call)
        self.size += len(call.encoded.body)
        self.open += 1


class Dispatcher:
    """Sends the calls of one sandbox.

    A call for an idle slot leaves at the end of the current turn of the event loop (or of `window_s`), together with all others
    that came up meanwhile: alone as `/execute`, several as one streamed `/batch`, of which each result is handed out as it
    comes. Calls for a slot that is busy pile up and then leave together. So there are never more requests in flight than
    slots, and a long command holds up nobody but its own slot.
    """

    def __init__(self, client: SlotServerClient, *, window_s: float = 0.0, max_batch_size: int = MAX_BATCH_ITEMS) -> None:
        self._client = client
        self._window_s = window_s
        self._max_batch_size = min(max_batch_size, MAX_BATCH_ITEMS)
        self._lanes: dict[str, _Lane] = {}
        self._departing: dict[_Lane, None] = {}
        self._flights: set[asyncio.Task[None]] = set()
        self._failure: SandboxError | None = None

    async def submit(self, request: ExecuteRequest) -> ExecutionResult:
        """Run one call; `request` needs an `execution_id`. A cancelled caller does not disturb the calls beside its own.

        Raises:
            SandboxError: as `SlotServerClient.execute`, or what `fail` was told.
        """
        if self._failure is not None:
            raise self._failure
        call = _Call(EncodedCall.of(request), asyncio.get_running_loop().create_future())
        lane = self._lanes.setdefault(request.slot_id, _Lane())
        lane.waiting.append(call)
        if lane.under_way == 0:
            self._depart(lane)
        return await call.future

    def fail(self, error: SandboxError) -> None:
        """End all calls with `error` at once, and all later ones."""
        self._failure = error
        for lane in self._lanes.values():
            for call in lane.waiting:
                call.settle(error)
            lane.waiting.clear()
        for task in self._flights:
            task.cancel()

    async def close(self, error: SandboxError) -> None:
        """`fail`, and wait until nothing is under way."""
        self.fail(error)
        if self._flights:
            await asyncio.wait(self._flights)

    def _depart(self, lane: _Lane) -> None:
        if not self._departing:
            loop = asyncio.get_running_loop()
            if self._window_s > 0:
                loop.call_later(self._window_s, self._send_departing)
            else:
                loop.call_soon(self._send_departing)
        self._departing[lane] = None

    def _send_departing(self) -> None:
        lanes, self._departing = self._departing, {}
        flight = _Flight()
        for lane in lanes:
            while lane.waiting:
                call = lane.waiting.popleft()
                if call.future.done():
                    continue
                if not flight.has_room(call, self._max_batch_size):
                    if lane.under_way > 0:
                        # The rest of a slot's calls waits for those that have just boarded.
                        lane.waiting.appendleft(call)
                        break
                    self._send(flight)
                    flight = _Flight()
                lane.under_way += 1
                flight.add(call)
        if flight.calls:
            self._send(flight)

    def _send(self, flight: _Flight) -> None:
        task = asyncio.create_task(self._fly(flight.calls))
        self._flights.add(task)
        task.add_done_callback(partial(self._landed, flight))
        for call in flight.calls:
            call.future.add_done_callback(partial(self._settled, flight, call, task))

    async def _fly(self, calls: Sequence[_Call]) -> None:
        if len(calls) == 1:
            calls[0].settle(await self._client.execute(calls[0].encoded))
        else:
            encoded = [call.encoded for call in calls]
            await self._client.execute_many(encoded, lambda index, outcome: calls[index].settle(outcome))

    def _settled(self, flight: _Flight, call: _Call, task: asyncio.Task[None], future: asyncio.Future[ExecutionResult]) -> None:
        """A call has its outcome, or its caller went away."""
        flight.abandoned |= future.cancelled()
        flight.open -= 1
        if flight.open == 0 and flight.abandoned:
            task.cancel()
        lane = self._lanes[call.encoded.slot_id]
        lane.under_way -= 1
        if lane.under_way == 0 and lane.waiting:
            self._depart(lane)

    def _landed(self, flight: _Flight, task: asyncio.Task[None]) -> None:
        """A flight is over: whoever has no outcome yet gets the reason."""
        self._flights.discard(task)
        if task.cancelled():
            error: BaseException | None = self._failure or SandboxUnavailableError("the call was given up")
        else:
            error = task.exception()
        if error is not None:
            for call in flight.calls:
                call.settle(error)
