"""A sandbox as the host sees it."""

from __future__ import annotations

from collections.abc import Sequence

from backends.client import SlotServerClient
from backends.dispatch import Dispatcher
from backends.errors import SandboxError
from backends.layers import LayerShelf


class Sandbox:
    """One slot server: the way to it, its slots and its layers. `sandbox_id` is never used twice."""

    def __init__(self, sandbox_id: str, client: SlotServerClient, slot_ids: Sequence[str], dispatcher: Dispatcher) -> None:
        self.sandbox_id = sandbox_id
        self.client = client
        self.slot_ids = tuple(slot_ids)
        self.dispatcher = dispatcher
        self.layers = LayerShelf()

    async def close(self, error: SandboxError) -> None:
        """End all requests with `error`; returns when nothing is under way."""
        await self.dispatcher.close(error)
        await self.client.close()
