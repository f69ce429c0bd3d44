"""The one thread in which torch works, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from tests.tinker_service.model import TinyModel
from tests.tinker_service.sampling import SamplingJob, SamplingResult, sample

Result = TypeVar("Result")

# How many completions are sampled at once: bounds the memory that their keys and values take.
SAMPLED_AT_ONCE = 256


@dataclass(eq=False)
class _Waiting:
    model: TinyModel
    job: SamplingJob
    result: SamplingResult | None = None


class Worker:
    """Runs one function after another, and samples for all requests that wait for the same model together.

    An async context manager: leaving it waits for the function that runs, and drops those that wait.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._waiting: list[_Waiting] = []

    async def __aenter__(self) -> Worker:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tinker-service")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    async def run(self, function: Callable[[], Result]) -> Result:
        """What `function` returns, once those before it have returned."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def sample(self, model: TinyModel, job: SamplingJob) -> SamplingResult:
        """Sample for one request."""
        waiting = _Waiting(model, job)
        self._waiting.append(waiting)
        return await self.run(lambda: self._sample_with_others(waiting))

    def _sample_with_others(self, first: _Waiting) -> SamplingResult:
        if first.result is None:
            self._waiting.remove(first)
            batch, room = [first], SAMPLED_AT_ONCE - first.job.num_samples
            for other in [other for other in self._waiting if other.model is first.model]:
                if other.job.num_samples <= room:
                    self._waiting.remove(other)
                    batch.append(other)
                    room -= other.job.num_samples
            results = sample(first.model, [waiting.job for waiting in batch], self._decode)
            for waiting, result in zip(batch, results, strict=True):
                waiting.result = result
        assert first.result is not None
        return first.result
