"""Results of executions, which make requests with an execution id idempotent."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from sandbox_image.errors import RequestError
from sandbox_image.protocol import ExecutionResult

MAX_REMEMBERED = 1000
MAX_REMEMBERED_CHARACTERS = 64 * 1024 * 1024


class ExecutionLog:
    """The outcomes of the latest executions with an id, those that still run included."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[tuple[str, ...], asyncio.Future[ExecutionResult]] = OrderedDict()
        self._sizes: dict[tuple[str, ...], int] = {}
        self._size = 0

    async def once(self, key: tuple[str, ...], execute: Callable[[], Awaitable[ExecutionResult]]) -> ExecutionResult:
        """Execute the first call with a key; a retry gets the outcome of that, and waits for it if necessary.

        Raises:
            RequestError: as the first call did.
        """
        known = self._outcomes.get(key)
        if known is not None:
            return await asyncio.shield(known)
        outcome = self._outcomes[key] = asyncio.get_running_loop().create_future()
        try:
            result = await execute()
        except RequestError as error:
            outcome.set_exception(error)
            # Retrieved, so that nothing is logged if there is no retry.
            outcome.exception()
            self._account(key, len(str(error)))
            raise
        except BaseException:
            outcome.cancel()
            del self._outcomes[key]
            raise
        outcome.set_result(result)
        self._account(key, len(result.output))
        return result

    def _account(self, key: tuple[str, ...], size: int) -> None:
        self._sizes[key] = size
        self._size += size
        # Running executions are neither counted nor forgotten; their number is that of the requests in flight.
        while self._sizes and (len(self._sizes) > MAX_REMEMBERED or self._size > MAX_REMEMBERED_CHARACTERS):
            oldest = next(iter(self._sizes))
            self._size -= self._sizes.pop(oldest)
            del self._outcomes[oldest]
