"""Requests that were accepted: a client gets a request's id at once, and asks for its result by that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from google.protobuf.message import Message
from pydantic import BaseModel
from tinker import types
from tinker.types.try_again_response import TryAgainResponse

from tests.tinker_service.errors import NotFound, RequestRefused

logger = logging.getLogger(__name__)

Reply = BaseModel | Message


class Promises:
    """The tasks of accepted requests by request id."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Reply]] = {}

    async def close(self) -> None:
        """Cancel what is not done."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def submit(self, request_id: str, perform: Callable[[], Awaitable[Reply]]) -> None:
        """Begin a request; nothing happens if it is known, as a client sends a request again when the answer got lost."""

        async def run() -> Reply:
            return await perform()

        if request_id not in self._tasks:
            self._tasks[request_id] = asyncio.create_task(run(), name=request_id)

    async def retrieve(self, request_id: str, wait_s: float) -> Reply:
        """A request's result or failure; "try again" if there is none after `wait_s` seconds.

        Raises:
            NotFound: There is no such request.
        """
        if request_id not in self._tasks:
            raise NotFound(f"there is no request {request_id!r}")
        task = self._tasks[request_id]
        await asyncio.wait([task], timeout=wait_s)
        if not task.done():
            return TryAgainResponse(request_id=request_id, queue_state="active")
        if task.cancelled():
            raise NotFound(f"request {request_id!r} was given up, as the service ends")
        error = task.exception()
        if isinstance(error, RequestRefused):
            return types.RequestFailedResponse(error=str(error), category=types.RequestErrorCategory.User)
        if error is not None:
            logger.error("request %s failed", request_id, exc_info=error)
            return types.RequestFailedResponse(error=repr(error), category=types.RequestErrorCategory.Server)
        return task.result()


class Turns:
    """Lets a model's requests run in the order of their numbers, whatever the order in which they arrive."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._moved = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, number: int) -> AsyncIterator[None]:
        """Wait for the turn with this number, and give it to the next one when done, whether or not that went well."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._next >= number)
        try:
            yield
        finally:
            async with self._moved:
                self._next = max(self._next, number + 1)
                self._moved.notify_all()
