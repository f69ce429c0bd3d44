"""Slots on this machine: a slot server as a child process, boxed by bubblewrap."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from backends.errors import BackendConfigError, SandboxError, SandboxUnavailableError, SlotLostError
from backends.local_server import LocalServer, remove_abandoned
from backends.options import PoolOptions
from backends.pool import SlotPool
from backends.pooled import PooledBackend
from backends.sandbox import Sandbox
from backends.teardown import finish

RESTARTS_IN_A_ROW = 6
RESTART_PAUSE_S = (0.1, 5.0)
"""First and longest pause before the server is started again."""
STABLE_AFTER_S = 10.0
"""A server that ran this long did not die of what the one before it died of."""

_log = logging.getLogger(__name__)


class LocalOptions(PoolOptions):
    """Options of the local backend."""

    local_slots: int = Field(8, ge=1, le=1000, description="How many slots there are.")
    local_isolation: Literal["bubblewrap", "none"] = Field(
        "bubblewrap", description="What keeps slots apart; `none` needs `require_sandbox: false`."
    )
    local_data_dir: str | None = Field(
        None, description="Where workspaces are kept, each run in a directory of its own; the system's temporary directory."
    )


class LocalBackend(PooledBackend):
    """One slot server on this machine. It is started again if it dies, which costs the slots that were in use."""

    options_class: ClassVar[type[PoolOptions]] = LocalOptions
    options: LocalOptions

    interpreter: ClassVar[Sequence[str]] = (sys.executable,)
    """How the command line of the server begins."""

    def __init__(self, options: LocalOptions) -> None:
        super().__init__(options)
        self._server: LocalServer | None = None
        self._sandbox: Sandbox | None = None
        self._launches = 0
        self._demand = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `ToolBackend.start`. Does nothing if it runs already."""
        if self._pool is not None:
            return
        if self.options.local_isolation == "none" and self.options.require_sandbox:
            raise BackendConfigError("local_isolation: `none` needs `require_sandbox: false`; or use `bubblewrap`")
        await asyncio.to_thread(remove_abandoned, self.options.local_data_dir)
        self._pool = self._new_pool()
        try:
            await self._launch(self._pool)
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(self._pool))

    async def stop(self, *, purge: bool = False) -> None:
        """See `ToolBackend.stop`. Nothing is kept for a later start in any case."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await finish(self._ending)

    async def _end(self) -> None:
        supervisor, pool = self._supervisor, self._pool
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait([supervisor])
        if pool is not None:
            await pool.close()
        await self._bury(SlotLostError("the backend was stopped"))
        self._supervisor = self._pool = self._ending = None

    async def _launch(self, pool: SlotPool) -> None:
        options = self.options
        server = await LocalServer.start(
            slots=options.local_slots,
            isolation=options.local_isolation,
            parent=options.local_data_dir,
            arguments=options.server_arguments(),
            interpreter=self.interpreter,
        )
        self._launches += 1
        self._server = server
        self._sandbox = self._new_sandbox(f"local-{self._launches}", server.client, options.local_slots)
        pool.add(self._sandbox)

    async def _bury(self, error: SandboxError) -> None:
        """Remove what a server left; may be interrupted and called again."""
        if self._sandbox is not None:
            if self._pool is not None:
                self._pool.remove(self._sandbox, error)
            await self._sandbox.close(error)
        if self._server is not None:
            await self._server.stop()
        self._server = self._sandbox = None

    async def _supervise(self, pool: SlotPool) -> None:
        """Start the server again whenever it dies."""
        deaths = 0
        while self._server is not None:
            started = asyncio.get_running_loop().time()
            how = await self._server.wait()
            _log.warning("%s", how)
            if asyncio.get_running_loop().time() - started > STABLE_AFTER_S:
                deaths = 0
            await self._bury(SlotLostError(how))
            deaths = await self._revive(pool, deaths + 1, how)

    async def _revive(self, pool: SlotPool, deaths: int, reason: str) -> int:
        """Start the server again, after a pause that grows with the number of `deaths` in a row; returns that number."""
        first, longest = RESTART_PAUSE_S
        while True:
            if deaths > RESTARTS_IN_A_ROW:
                pool.fail(SandboxUnavailableError(f"the slot server does not stay up: {reason}"))
                # Not for ever: the next who wants a slot causes as many attempts.
                self._demand.clear()
                await self._demand.wait()
                deaths = 1
            await asyncio.sleep(min(first * 2 ** (deaths - 1), longest))
            try:
                await self._launch(pool)
            except SandboxError as error:
                reason = str(error)
                _log.warning("the slot server does not come up: %s", reason)
                deaths += 1
            else:
                self._sandbox_restarts += 1
                return deaths

    def _on_demand(self) -> None:
        self._demand.set()
