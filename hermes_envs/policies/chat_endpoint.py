"""One OpenAI-compatible chat endpoint."""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp

from hermes_envs.errors import EngineError
from hermes_envs.policies.base import ContextFullError
from hermes_envs.policies.endpoint import Endpoint, one_line

# OpenAI, vLLM, SGLang and llama.cpp, in this order.
_CONTEXT_FULL = re.compile(
    r"context_length_exceeded|maximum context length|longer than the model's context length|exceed_context_size", re.IGNORECASE
)


class ChatEndpoint(Endpoint):
    """Asks one server for chat completions."""

    uses_proxies = True

    async def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask for one chat completion; `request` is the body without the model's name. Returns the reply's JSON object.

        Raises:
            EngineError: as `Endpoint.post`, or the reply is no JSON object.
            ContextFullError: the endpoint says that the messages do not fit into the model's context.
        """
        reply = await self.post(f"{self.address.rstrip('/')}/chat/completions", {"model": self.config.model_name, **request})
        if not isinstance(reply, dict):
            raise EngineError(f"the endpoint {self.address} did not answer with a JSON object: {one_line(repr(reply))}")
        return reply

    def failure(self, response: aiohttp.ClientResponse, text: str) -> Exception:
        """As `Endpoint.failure`; a full context has no status of its own and is told by the words of the reply."""
        return ContextFullError(one_line(text)) if _CONTEXT_FULL.search(text) else super().failure(response, text)

    def parse(self, text: str) -> Any:
        """As `Endpoint.parse`; lone surrogates, which JSON can spell and no file can hold, become U+FFFD."""
        spelled = json.dumps(super().parse(text), ensure_ascii=False)
        return json.loads(spelled.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
