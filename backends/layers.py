"""Which layers a sandbox has, and who is building one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class LayerShelf:
    """The frozen layers of one sandbox; each is built once, however many ask for it at the same time."""

    def __init__(self) -> None:
        self._ready: set[str] = set()
        self._builds: dict[str, asyncio.Future[None]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the layer is there or on its way."""
        return name in self._ready or name in self._builds

    async def ensure(self, name: str, build: Callable[[], Awaitable[None]]) -> None:
        """Return when the layer is there. Whoever comes first builds it; if that one is cancelled, the next in line does.

        Raises:
            Exception: whatever the build raised, to all who waited for this build. Later callers try anew.
        """
        while name not in self._ready:
            running = self._builds.get(name)
            if running is None:
                await self._build(name, build)
                return
            await asyncio.wait([running])
            if not running.cancelled():
                running.result()

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
            self._ready.add(name)
            outcome.set_result(None)
        finally:
            del self._builds[name]
            # Still open only if the builder was cancelled.
            outcome.cancel()
