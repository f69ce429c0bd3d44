"""The layers of a sandbox, and the builds of layers that are running."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class LayerShelf:
    """The frozen layers of one sandbox. Concurrent requests for a layer share one build."""

    def __init__(self) -> None:
        self._ready: dict[str, object] = {}
        self._builds: dict[str, asyncio.Future[None]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the layer exists or is being built."""
        return name in self._ready or name in self._builds

    async def ensure(self, name: str, build: Callable[[], Awaitable[None]]) -> object:
        """Return when the layer exists, after building it or waiting for a running build.

        If the task that builds is cancelled, the next waiter builds. Returns an identifier of the build, for `forget`.

        Raises:
            Exception: what the build raised, to all that waited for it. Later callers start a new build.
        """
        while name not in self._ready:
            running = self._builds.get(name)
            if running is None:
                await self._build(name, build)
                break
            await asyncio.wait([running])
            if not running.cancelled():
                running.result()
        return self._ready[name]

    def forget(self, name: str, build: object) -> None:
        """Note that the layer was deleted from the sandbox, unless it has been built again since `build`."""
        if self._ready.get(name) is build:
            del self._ready[name]

    async def _build(self, name: str, build: Callable[[], Awaitable[None]]) -> None:
        outcome = self._builds[name] = asyncio.get_running_loop().create_future()
        try:
            await build()
        except Exception as error:
            outcome.set_exception(error)
            # Nobody may be waiting for it.
            outcome.exception()
            raise
        else:
            self._ready[name] = object()
            outcome.set_result(None)
        finally:
            del self._builds[name]
            # Still open only if the builder was cancelled.
            outcome.cancel()
