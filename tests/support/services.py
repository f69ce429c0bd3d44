"""HTTP services, in processes of their own, and a client that says what it likes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

import hermes_envs
from tests.support.waiting import PATIENCE_S

CHECKOUT = Path(hermes_envs.__path__[0]).parent


@dataclass
class Client:
    """Asks a service, with a token; `post` sends bytes as they are, and anything else as JSON."""

    session: aiohttp.ClientSession
    url: str
    token: str

    async def ask(self, method: str, route: str, body: object = None, token: str | None = None) -> tuple[int, Any]:
        """The status and the decoded answer."""
        given = self.token if token is None else token
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.request(method, self.url + route, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def get(self, route: str, token: str | None = None) -> tuple[int, Any]:
        """GET."""
        return await self.ask("GET", route, token=token)

    async def post(self, route: str, body: object, token: str | None = None) -> tuple[int, Any]:
        """POST."""
        return await self.ask("POST", route, body, token)

    async def until(self, route: str, condition: Callable[[Any], bool]) -> None:
        """Wait until an answer is such."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition((await self.get(route))[1]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@asynccontextmanager
async def client_of(port: int, token: str) -> AsyncIterator[Client]:
    """A client of a service on this machine."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield Client(session, f"http://127.0.0.1:{port}", token)


@dataclass
class Service:
    """A service as a process of its own."""

    process: asyncio.subprocess.Process
    client: Client

    async def end(self) -> tuple[int, str]:
        """Send SIGTERM and wait: the exit status, and what it said on standard error."""
        self.process.terminate()
        _, said = await asyncio.wait_for(self.process.communicate(), PATIENCE_S)
        assert self.process.returncode is not None
        return self.process.returncode, said.decode()


async def start(module: str, *flags: str, **variables: str) -> asyncio.subprocess.Process:
    """Start a module as a user would."""
    known = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *flags),
        env={**known, "PYTHONPATH": str(CHECKOUT), **variables},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def running(module: str, *flags: str, token: str, **variables: str) -> AsyncIterator[Service]:
    """Start a service and wait until it is ready."""
    process = await start(module, *flags, **variables)
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
        assert line, (await process.communicate())[1].decode()
        ready = json.loads(line)
        assert ready["ready"] is True
        async with client_of(ready["port"], token) as client:
            yield Service(process, client)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def refusal(module: str, *flags: str, **variables: str) -> tuple[int, str]:
    """The exit status and the words of a service that does not start."""
    process = await start(module, *flags, **variables)
    said, errors = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert said == b""
    assert process.returncode is not None
    return process.returncode, errors.decode()
