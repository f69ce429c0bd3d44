"""SGLang's `POST /generate` in front of a real model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from aiohttp import web

from tests.engine.engine import Exchange


@dataclass(frozen=True)
class Completion:
    """What a model said; `logprobs` are those of temperature 1. `stopped`: it ended its turn itself."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool


class GenerateServer(ABC):
    """Keeps every prompt as it came and what the model made of it. Text in `stop` is not looked for, token ids are."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    @abstractmethod
    async def complete(
        self, prompt_ids: Sequence[int], max_tokens: int, temperature: float, stop_ids: Sequence[int]
    ) -> Completion:
        """Sample from the whole distribution until a stop token, which belongs to the completion, or the limit."""

    async def __aenter__(self) -> GenerateServer:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/generate", self._generate)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        prompt, parameters = body["input_ids"], body["sampling_params"]
        completion = await self.complete(
            prompt, parameters["max_new_tokens"], parameters["temperature"], parameters["stop_token_ids"]
        )
        self.exchanges.append(Exchange(tuple(prompt), tuple(completion.token_ids), tuple(completion.logprobs)))
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        meta = {
            "finish_reason": {"type": "stop" if completion.stopped else "length"},
            "output_token_logprobs": [[logprob, token, None] for logprob, token in pairs],
        }
        return web.json_response({"text": "", "meta_info": meta})
