"""One OpenAI-compatible chat endpoint."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import httpx2
import openai

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.policies.base import ContextFullError

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig

REPLY_LIMIT_BYTES = 16 * 2**20
"""No turn of a model is this long; what is, would fill the memory before anybody looks at it."""

RETRIES = 2

# OpenAI, vLLM, SGLang and llama.cpp, in this order.
_CONTEXT_FULL = re.compile(
    r"context_length_exceeded|maximum context length|longer than the model's context length|exceed_context_size", re.IGNORECASE
)


class ChatEndpoint:
    """Sends requests to one server and reads replies up to a limit.

    Goes around atroposlib's `chat_completion`, which nests three tries of three, waits without end when health checks fail, and
    reads a reply of any size through the SDK's models, to which half of the endpoints in use do not keep. The SDK's own retries
    (connection errors, 408, 409, 429, 5xx, with the server's `Retry-After`) are finite and enough. `timeout` of the server's
    config is for the request with all its retries.
    """

    def __init__(self, config: APIServerConfig) -> None:
        """Raises: ConfigError: the config names no address."""
        if not config.base_url:
            raise ConfigError("openai.base_url: policy messages needs the address of a chat endpoint")
        self.address = str(config.base_url)
        self.in_flight = 0
        self._model = config.model_name
        self._timeout_s = config.timeout
        self._at_once = asyncio.Semaphore(config.num_max_requests_at_once)
        self._client = openai.AsyncOpenAI(
            # The SDK refuses to start without a key, and endpoints that need none take any.
            api_key=config.api_key or "none",
            base_url=self.address,
            timeout=self._timeout_s,
            max_retries=RETRIES,
        )

    async def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask for one chat completion; `request` is the body without the model's name. Returns the reply's JSON object.

        Raises:
            EngineError: the endpoint refused, timed out, or did not answer with a JSON object.
            ContextFullError: the endpoint says that the messages do not fit into the model's context.
        """
        self.in_flight += 1
        try:
            async with self._at_once, asyncio.timeout(self._timeout_s):
                return _json_object(await self._post(request), self.address)
        except TimeoutError as reason:
            raise EngineError(f"the endpoint {self.address} did not answer within {self._timeout_s} s") from reason
        except openai.APIStatusError as reason:
            # The SDK's message has the endpoint's own only where that came as JSON.
            what = reason.message if isinstance(reason.body, dict) else f"{reason.message}: {reason.body}"
            if _CONTEXT_FULL.search(f"{what} {reason.body}"):
                raise ContextFullError(_one_line(what)) from reason
            raise EngineError(f"the endpoint {self.address} refused: {_one_line(what)}") from reason
        except (openai.OpenAIError, httpx2.HTTPError) as reason:
            cause = reason.__cause__ or reason
            what = f"{type(reason).__name__}: {_one_line(str(cause))}"
            raise EngineError(f"the endpoint {self.address} failed: {what}") from reason
        finally:
            self.in_flight -= 1

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _post(self, request: dict[str, Any]) -> bytes:
        body = bytearray()
        async with self._client.chat.completions.with_streaming_response.create(model=self._model, **request) as response:
            async for chunk in response.iter_bytes():
                body += chunk
                if len(body) > REPLY_LIMIT_BYTES:
                    raise EngineError(f"the endpoint {self.address} sent more than {REPLY_LIMIT_BYTES} bytes")
        return bytes(body)


def _json_object(body: bytes, address: str) -> dict[str, Any]:
    if not body.strip():
        raise EngineError(f"the endpoint {address} sent an empty reply")
    # A model's broken UTF-8 is its own doing: what can be read of the answer is kept.
    text = body.decode(errors="replace")
    try:
        # A lone surrogate, which JSON can spell but no file can hold, goes the same way.
        spelled = json.dumps(json.loads(text), ensure_ascii=False)
        reply = json.loads(spelled.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError) as reason:
        raise EngineError(f"the endpoint {address} did not answer with JSON: {_one_line(text)!r}") from reason
    if not isinstance(reply, dict):
        raise EngineError(f"the endpoint {address} did not answer with a JSON object: {_one_line(text)!r}")
    return reply


def _one_line(text: str, limit: int = 300) -> str:
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[:limit] + "..."
