"""Which of several inference servers gets a request, and when a request is sent again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from hermes_envs.errors import EngineError, EngineUnavailableError
from hermes_envs.policies.endpoint import HEALTH_POLL_S, Endpoint

logger = logging.getLogger(__name__)

RETRIES = 2
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0
AVOIDED_S = 5.0
"""For how long an endpoint that has failed gets requests only if no other has room."""

E = TypeVar("E", bound=Endpoint)
Answer = TypeVar("Answer")


class Endpoints(Generic[E]):
    """Hands requests to the least busy endpoint that is up, in the order in which they come.

    A request that fails with `EngineUnavailableError` is sent again after a pause: `RETRIES` times, and once more for each
    further endpoint. Any other failure is final. There may be no endpoint at all, for policies that ask no model.
    """

    def __init__(self, endpoints: Iterable[E] = (), patience_s: float = 300.0) -> None:
        """`patience_s`: how long a request waits while no endpoint is up."""
        self._endpoints = list(endpoints)
        self._patience_s = patience_s
        self._queue = asyncio.Lock()
        self._room = asyncio.Event()
        self._up_at = 0.0

    @property
    def models(self) -> list[str]:
        """The model's name at each endpoint."""
        return [endpoint.model for endpoint in self._endpoints]

    def limit_requests(self, weight: float) -> None:
        """Use only this share of what the endpoints take at once; 1 is all of it."""
        for endpoint in self._endpoints:
            endpoint.limit_requests(weight)
        self._room.set()

    async def ask(self, send: Callable[[E], Awaitable[Answer]]) -> Answer:
        """Have `send` ask an endpoint, and another one or the same again where that may help.

        Raises:
            EngineError: as `send`, or no endpoint has been up for `patience_s`.
        """
        for attempt in range(RETRIES + len(self._endpoints) - 1):
            try:
                return await self._ask_once(send)
            except EngineUnavailableError as reason:
                pause_s = reason.retry_after_s
                if pause_s is None:
                    pause_s = min(LONGEST_BACKOFF_S, BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.0)
                logger.warning("%s; asking again in %.1f s", reason, pause_s)
                await asyncio.sleep(pause_s)
        return await self._ask_once(send)

    def metrics(self) -> dict[str, float]:
        """How long the last requests to each endpoint took, in seconds, by atroposlib's names."""
        figures: dict[str, float] = {}
        for number, endpoint in enumerate(self._endpoints):
            if seconds := sorted(endpoint.request_seconds):
                name = f"server/server_{number}_request_time"
                figures |= {f"{name}_avg": statistics.fmean(seconds), f"{name}_std": statistics.pstdev(seconds)}
                figures[f"{name}_99p"] = seconds[int(0.99 * (len(seconds) - 1))]
        return figures

    async def aclose(self) -> None:
        """Close the connections of all endpoints."""
        for endpoint in self._endpoints:
            await endpoint.aclose()

    async def _ask_once(self, send: Callable[[E], Awaitable[Answer]]) -> Answer:
        endpoint = await self._take_place()
        try:
            return await send(endpoint)
        finally:
            endpoint.in_flight -= 1
            self._room.set()

    async def _take_place(self) -> E:
        asked_at = time.monotonic()
        # The lock is a queue: only the first in it waits for room.
        async with self._queue:
            while not (free := [endpoint for endpoint in self._endpoints if endpoint.has_room]):
                self._check_patience(asked_at)
                self._room.clear()
                # Nobody tells when an endpoint comes up.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEALTH_POLL_S):
                        await self._room.wait()
            now = self._up_at = time.monotonic()
            endpoint = min(free, key=lambda one: (one.failed_at if now - one.failed_at < AVOIDED_S else 0.0, one.load))
            endpoint.in_flight += 1
            return endpoint

    def _check_patience(self, asked_at: float) -> None:
        now = time.monotonic()
        if any(endpoint.is_up for endpoint in self._endpoints):
            self._up_at = now
        elif now - max(asked_at, self._up_at) > self._patience_s:
            addresses = ", ".join(endpoint.address for endpoint in self._endpoints)
            raise EngineError(f"no engine has been healthy for {self._patience_s:g} s: {addresses}")
