"""Which layers a sandbox has, and who is building one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class LayerShelf:
    """The frozen layers of one sandbox; each is built once, however many ask for it at the same time."""

    def __init__(self) -> None:
        self._ready: dict[str, object] = {}
        self._builds: dict[str, asyncio.Future[None]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the layer is there or on its way."""
        return name in self._ready or name in self._builds

    async def ensure(self, name: str, build: Callable[[], Awaitable[None]]) -> object:
        """Return when the layer is there. Whoever comes first builds it; if that one is cancelled, the next in line does.

        What is returned stands for this build, for `forget`.

        Raises:
            Exception: whatever the build raised, to all who waited for this build. Later callers try anew.
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
        """The sandbox does not have the layer any more; nothing if it has been built again meanwhile."""
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
