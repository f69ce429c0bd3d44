"""An OpenAI-compatible chat endpoint over HTTP that says what a test tells it to.

Left out: streaming, several choices, every route but `/v1/chat/completions`. It judges no request; it keeps them.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from types import TracebackType
from typing import Any

from aiohttp import web

Answer = Callable[[dict[str, Any]], object]
"""From a request's body to a reply's JSON or a whole response."""


def completion(finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """A reply with one message."""
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}


class ChatServer:
    """Gives the answers in their order, and the last of them from then on.

    `at_once` is the most requests that it has had at a time, `connections` are those that requests came over.
    """

    def __init__(self, *answers: Answer | dict[str, Any], delay_s: float = 0.0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.at_once = 0
        self.connections: set[object] = set()
        self._now = self._port = 0
        self._answers = list(answers)
        self._delay_s = delay_s

    async def __aenter__(self) -> ChatServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen at a free port, or again at the one that it had."""
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.base_url = f"http://127.0.0.1:{self._port}/v1"

    async def stop(self) -> None:
        """Close the port: from now on connections are refused."""
        await self._runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.connections.add(request.protocol)
        self.requests.append(body)
        self._now += 1
        self.at_once = max(self.at_once, self._now)
        try:
            await asyncio.sleep(self._delay_s)
        finally:
            self._now -= 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        reply = copy.deepcopy(answer) if isinstance(answer, dict) else answer(body)
        return reply if isinstance(reply, web.StreamResponse) else web.json_response(reply)
