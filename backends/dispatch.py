"""How calls travel to one sandbox: those of a slot one after another, those of several slots together if they come together."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from backends.client import SlotServerClient
from backends.codec import EncodedCall, Outcome, RefusedError
from backends.errors import SandboxError
from backends.http import ConnectionLostError, NotDeliveredError
from sandbox_image.protocol import MAX_BATCH_ITEMS, ExecuteRequest, ExecutionResult

_MAX_BATCH_BYTES = 8 << 20


class Dispatcher:
    """Sends the calls of one sandbox.

    The calls of a slot are sent one after another, in the order in which they were made: a slot runs one call at a time. So
    there are never more requests in flight than slots, and a long command holds up nobody but its own slot. A call whose slot
    is idle leaves at the end of the current turn of the event loop, or of `window_s`, together with those of other slots that
    came up meanwhile: alone as `/execute`, several as one streamed `/batch`, of which each result is handed out as it comes.
    Without batches 64 callers that keep two cores busy get a sixth less done.
    """

    def __init__(self, client: SlotServerClient, *, window_s: float = 0.0, max_batch_size: int = MAX_BATCH_ITEMS) -> None:
        self._client = client
        self._window_s = window_s
        self._max_batch_size = min(max_batch_size, MAX_BATCH_ITEMS)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._scopes: set[asyncio.Timeout] = set()
        self._boarding: _Batch | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self._failure: SandboxError | None = None

    async def submit(self, request: ExecuteRequest) -> ExecutionResult:
        """Run one call; `request` needs an `execution_id`. A cancelled caller does not disturb the calls beside its own.

        Raises:
            SandboxError: as `SlotServerClient.execute`, or what `fail` was told.
        """
        if self._failure is not None:
            raise self._failure
        call = EncodedCall.of(request)
        scope = asyncio.timeout(None)
        self._scopes.add(scope)
        try:
            async with scope, self._turns[request.slot_id]:
                return await self._send(call)
        except (TimeoutError, SandboxError):
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            self._scopes.discard(scope)

    def fail(self, error: SandboxError) -> None:
        """End all calls with `error` at once, and all later ones."""
        self._failure = error
        now = asyncio.get_running_loop().time()
        while self._scopes:
            self._scopes.pop().reschedule(now)

    async def close(self, error: SandboxError) -> None:
        """`fail`, and wait until nothing is under way."""
        self.fail(error)
        if self._batches:
            await asyncio.wait(self._batches)

    async def _send(self, call: EncodedCall) -> ExecutionResult:
        outcome = await self._board(call)
        if outcome is None:
            return await self._client.execute(call)
        if isinstance(outcome, SandboxError):
            raise outcome
        return outcome

    async def _board(self, call: EncodedCall) -> Outcome | None:
        """Travel with the calls of the current window; None if the call has to be sent alone after all."""
        if self._boarding is None or not self._boarding.has_room(call):
            self._boarding = _Batch(self._client, self._window_s, self._max_batch_size)
            self._batches.add(self._boarding.trip)
            self._boarding.trip.add_done_callback(self._batches.discard)
        return await self._boarding.outcome_of(call)


class _Batch:
    """Calls of different slots that travel in one request when a window has passed; each caller awaits its own outcome."""

    def __init__(self, client: SlotServerClient, window_s: float, max_calls: int) -> None:
        self._max_calls = max_calls
        self._bytes = self._waiting = 0
        self._closed = False
        self._calls: list[tuple[EncodedCall, asyncio.Future[Outcome | None]]] = []
        self.trip = asyncio.create_task(self._travel(client, window_s))

    def has_room(self, call: EncodedCall) -> bool:
        """Whether the call can still come along."""
        return not self._closed and len(self._calls) < self._max_calls and self._bytes + len(call.body) <= _MAX_BATCH_BYTES

    async def outcome_of(self, call: EncodedCall) -> Outcome | None:
        """Come along; None if the batch has no outcome for the call, which may have run or not."""
        outcome: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
        self._calls.append((call, outcome))
        self._bytes += len(call.body)
        self._waiting += 1
        try:
            return await outcome
        finally:
            self._waiting -= 1
            if outcome.cancelled() and not self._waiting:
                # The last caller went away.
                self._closed = True
                self.trip.cancel()

    async def _travel(self, client: SlotServerClient, window_s: float) -> None:
        await asyncio.sleep(window_s)
        self._closed = True
        aboard = [(call, outcome) for call, outcome in self._calls if not outcome.done()]
        reason: SandboxError | None = None
        try:
            if len(aboard) > 1:
                calls = [call for call, _ in aboard]
                await client.execute_many(calls, lambda index, outcome: _settle(aboard[index][1], outcome))
        except (RefusedError, NotDeliveredError, ConnectionLostError):
            # Each is asked for alone, under its `execution_id`: a bad call, or a broken connection, harms no other call.
            pass
        except SandboxError as error:
            reason = error
        for _, outcome in aboard:
            _settle(outcome, reason)


def _settle(future: asyncio.Future[Outcome | None], outcome: Outcome | None) -> None:
    if not future.done():
        future.set_result(outcome)
