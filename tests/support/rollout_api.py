"""atroposlib's real API server in a process of its own, and the trainer's side of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from tests.support.waiting import PATIENCE_S

REGISTRATION: dict[str, Any] = {
    "wandb_group": "g",
    "wandb_project": "p",
    "batch_size": 4,
    "max_token_len": 4096,
    "checkpoint_dir": "",
    "save_checkpoint_interval": 0,
    "starting_step": 0,
    "num_steps": 5,
}


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RolloutApi:
    """`run-api` at `address`; what it prints is in `log`. `stop` and `start` again lose all it knew, at the same address."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> RolloutApi:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the process and wait until it answers."""
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "atroposlib.api.server:app",
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
        ]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        async with session.get(f"{self.address}/info"):
                            return
                    await asyncio.sleep(0.1)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the process; everything in its memory is gone."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None


class ScriptedTrainer:
    """What a trainer asks of the API, and nothing more: it registers, then takes batches."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._session = aiohttp.ClientSession()

    async def __aenter__(self) -> ScriptedTrainer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def register(self, **changes: Any) -> None:
        """Register with `REGISTRATION` and what differs from it; the first question for a batch then starts the run."""
        registration = REGISTRATION | changes
        while True:
            async with self._session.post(f"{self._address}/register", json=registration) as reply:
                assert reply.status == 200, await reply.text()
            if (await self.get("/info"))["batch_size"] == registration["batch_size"]:
                break
            # A group was on its way while the API was reset: it takes no trainer after that.
            await self.reset()
        assert await self.get("/batch") == {"batch": None}

    async def batch(self) -> list[dict[str, Any]]:
        """The next batch: a list of groups."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if batch := (await self.get("/batch"))["batch"]:
                    return list(batch)
                await asyncio.sleep(0.05)

    async def queue_of(self, groups: int) -> None:
        """Wait until so many groups or more are in the queue."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if (await self.get("/status"))["queue_size"] >= groups:
                    return
                await asyncio.sleep(0.05)

    async def reset(self) -> None:
        """Have the API forget everything."""
        async with self._session.get(f"{self._address}/reset_data") as reply:
            assert reply.status == 200, await reply.text()

    async def get(self, route: str) -> dict[str, Any]:
        """What a route answers."""
        async with self._session.get(self._address + route) as reply:
            assert reply.status == 200, await reply.text()
            return dict(await reply.json())
