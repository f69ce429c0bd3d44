"""A llama.cpp server for the time of a test, started by scripts/llama_server."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "llama_server"
START_S = 60.0


def llama_program() -> str:
    """The server's program, as scripts/llama_server finds it."""
    return os.environ.get("HERMES_ENVS_LLAMA_SERVER") or "llama-server"


@asynccontextmanager
async def llama_server(model: Path, *options: str) -> AsyncIterator[str]:
    """The URL of a server that is ready; what it says goes into a file beside the model. It has one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = model.with_suffix(".log")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            SCRIPT, model, "--port", str(port), "--threads", "1", *options, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        await asyncio.wait_for(_ready(process, url, log), START_S)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _ready(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            assert process.returncode is None, f"the server did not start: {_said(log)}"
            try:
                async with session.get(f"{url}/health") as response:
                    if response.ok:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)


def _said(log: Path) -> str:
    return log.read_text(errors="replace")
