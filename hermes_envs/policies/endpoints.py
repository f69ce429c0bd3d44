"""Which of several inference servers gets a request, and when a request is sent again."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from hermes_envs.errors import EngineUnavailableError
from hermes_envs.policies.endpoint import Endpoint

logger = logging.getLogger(__name__)

RETRIES = 2
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0
AVOIDED_S = 5.0
"""For how long an endpoint that has failed gets requests only if no other has room."""

E = TypeVar("E", bound=Endpoint)
Answer = TypeVar("Answer")


class Endpoints(Generic[E]):
    """Hands requests to the least busy endpoint, in the order in which they come.

    A request that fails with `EngineUnavailableError` is sent again after a pause: `RETRIES` times, and once more for each
    further endpoint. Any other failure is final. There may be no endpoint at all, for policies that ask no model.
    """

    def __init__(self, endpoints: Iterable[E] = (), patience_s: float = 0.0) -> None:
        """`patience_s`: for how long a request is sent again while no server is there, if a config has `health_check`."""
        self._endpoints = list(endpoints)
        self._patience_s = patience_s if any(endpoint.config.health_check for endpoint in self._endpoints) else 0.0
        self._queue = asyncio.Lock()
        self._room = asyncio.Event()

    @property
    def models(self) -> list[str]:
        """The model's name at each endpoint."""
        return [endpoint.config.model_name for endpoint in self._endpoints]

    def limit_requests(self, weight: float) -> None:
        """Send each endpoint at most this share of the requests that it takes at once, and at least one."""
        for endpoint in self._endpoints:
            endpoint.most_at_once = max(1, math.ceil(weight * endpoint.config.num_max_requests_at_once))
        self._room.set()

    async def ask(self, send: Callable[[E], Awaitable[Answer]]) -> Answer:
        """Have `send` ask an endpoint, and another one or the same again where that may help. Raises as `send`."""
        attempt, retries, away_since = 0, RETRIES + len(self._endpoints) - 1, math.inf
        while True:
            try:
                return await self._ask_once(send)
            except EngineUnavailableError as reason:
                now = time.monotonic()
                away_since = min(away_since, now)
                is_awaited = reason.is_away and now - away_since < self._patience_s
                if attempt >= retries and not is_awaited:
                    raise
                pause_s = _pause_s(reason, attempt)
                # Once is enough while an engine is awaited.
                level = logging.WARNING if attempt < retries else logging.DEBUG
                logger.log(level, "%s; asking again in %.1f s", reason, pause_s)
                await asyncio.sleep(pause_s)
                attempt += 1

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
        # The lock is a queue: only the first in it waits for room.
        async with self._queue:
            while not (free := [one for one in self._endpoints if one.in_flight < one.most_at_once]):
                self._room.clear()
                await self._room.wait()
            now = time.monotonic()
            endpoint = min(
                free,
                key=lambda one: (one.failed_at if now - one.failed_at < AVOIDED_S else 0.0, one.in_flight / one.most_at_once),
            )
            endpoint.in_flight += 1
            return endpoint


def _pause_s(reason: EngineUnavailableError, attempt: int) -> float:
    if reason.retry_after_s is not None:
        return max(reason.retry_after_s, BACKOFF_S)
    return min(LONGEST_BACKOFF_S, BACKOFF_S * 2.0**attempt) * random.uniform(0.5, 1.0)
