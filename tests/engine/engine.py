"""An inference engine over HTTP that keeps the truth: every prompt that it saw and every token that it produced.

Speaks three dialects of `POST /generate` and refuses what the real servers refuse:

- `sglang`: `input_ids` and `sampling_params`; stops at the model's end token, at `stop_token_ids` and at text in `stop`.
- `vllm`: `prompt.prompt_token_ids` and sampling parameters beside it, as the server that comes with atroposlib reads them.
- `tinker`: the Tinker trainer's: like `sglang`, but reads `n`, `max_new_tokens`, `temperature` and `stop` alone, stops at
  nothing else, and always says that it stopped.

Left out: streaming, batches (`n` above 1), sampling parameters beside the temperature, the servers' other routes. Logprobs are
those of temperature 1, as vLLM's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from tests.engine.model import RandomModel

Dialect = Literal["sglang", "vllm", "tinker"]

SGLANG_PARAMETERS = {"n", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos"}
VLLM_PARAMETERS = {"prompt", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "logprobs"}


@dataclass(frozen=True)
class Exchange:
    """One request that was answered: the prompt as it arrived, and what was sampled after it."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Generation:
    """What to generate and where to end."""

    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]


class Engine:
    """`script` may put words into the model's mouth: it gets the prompt and returns the first tokens of the completion.

    `mangle` may spoil a reply: it gets the reply's JSON object and returns what is sent instead. `delay_s` is how long a reply
    takes. `asked` is set when a request has come, `aborted` when one was given up by its sender. `favoured` are the tokens that
    the model says more often than others, if it has them: by default Qwen3's that end turns, begin calls and end reasoning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        dialect: Dialect,
        script: Callable[[list[int]], list[int]] = lambda prompt: [],
        mangle: Callable[[dict[str, Any]], object] = lambda reply: reply,
        delay_s: float = 0.0,
        favoured: Sequence[str] = ("<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "</think>"),
    ) -> None:
        self.exchanges: list[Exchange] = []
        self.requests: list[dict[str, Any]] = []
        self.asked, self.aborted = asyncio.Event(), asyncio.Event()
        self.dialect = dialect
        self._tokenizer = tokenizer
        known = tokenizer.get_added_vocab()
        self.model = RandomModel(len(tokenizer), [known[token] for token in favoured if token in known])
        self._random = numpy.random.default_rng(7)
        self._script = script
        self._mangle = mangle
        self._delay_s = delay_s
        self._exits = AsyncExitStack()

    def before_exit(self, close: Callable[[], Awaitable[None]]) -> None:
        """Have somebody who asks it close connections before it goes."""
        self._exits.push_async_callback(close)

    async def __aenter__(self) -> Engine:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/generate", self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._exits.aclose()
        await self.stop()

    async def stop(self) -> None:
        """Close the port: from now on connections are refused."""
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.asked.set()
        read = {"sglang": self._read_sglang, "vllm": self._read_vllm, "tinker": self._read_tinker}[self.dialect]
        generation = read(body)
        output, logprobs, matched = self._sample(generation)
        try:
            await asyncio.sleep(self._delay_s)
        except asyncio.CancelledError:
            self.aborted.set()
            raise
        self.exchanges.append(Exchange(tuple(generation.prompt_ids), tuple(output), tuple(logprobs)))
        reply = self._reply_vllm if self.dialect == "vllm" else self._reply_sglang
        sent = self._mangle(reply(generation, output, logprobs, matched))
        return sent if isinstance(sent, web.StreamResponse) else web.json_response(sent)

    def _sample(self, generation: Generation) -> tuple[list[int], list[float], int | str | None]:
        """Tokens, their logprobs, and the token or text that ended the completion, None where the limit did."""
        forced = self._script(generation.prompt_ids)
        output: list[int] = []
        logprobs: list[float] = []
        while len(output) < generation.max_tokens:
            context = generation.prompt_ids + output
            distribution = self.model.logprobs(context)
            if len(output) < len(forced):
                token = forced[len(output)]
            else:
                chances = numpy.exp(self.model.logprobs(context, max(generation.temperature, 1e-6)))
                token = int(self._random.choice(len(chances), p=chances / chances.sum()))
            output.append(token)
            logprobs.append(float(distribution[token]))
            if token in generation.stop_ids:
                return output, logprobs, token
            tail = self._tokenizer.decode(output[-24:]) if generation.stop_texts else ""
            for text in generation.stop_texts:
                if text in tail:
                    return output, logprobs, text
        return output, logprobs, None

    def _read_sglang(self, body: dict[str, Any]) -> Generation:
        parameters = body["sampling_params"]
        stop = parameters.get("stop") or []
        if unknown := set(parameters) - SGLANG_PARAMETERS:
            raise web.HTTPBadRequest(text=f"unknown sampling parameters {unknown}")
        if not all(isinstance(text, str) for text in stop):
            raise web.HTTPBadRequest(text="stop must be text")
        return Generation(
            prompt_ids=body["input_ids"],
            max_tokens=parameters.get("max_new_tokens", 128),
            temperature=parameters.get("temperature", 1.0),
            stop_ids=frozenset([self._tokenizer.eos_token_id, *parameters.get("stop_token_ids", [])]),
            stop_texts=tuple(stop),
        )

    def _read_vllm(self, body: dict[str, Any]) -> Generation:
        if unknown := set(body) - VLLM_PARAMETERS:
            raise web.HTTPInternalServerError(text=f"unexpected keyword arguments {unknown}")
        return Generation(
            prompt_ids=body["prompt"]["prompt_token_ids"],
            max_tokens=body.get("max_tokens", 16),
            temperature=body.get("temperature", 1.0),
            stop_ids=frozenset([self._tokenizer.eos_token_id, *body.get("stop_token_ids", [])]),
            stop_texts=tuple(body.get("stop", [])),
        )

    def _read_tinker(self, body: dict[str, Any]) -> Generation:
        parameters = body["sampling_params"]
        stop = parameters.get("stop", [])
        return Generation(
            prompt_ids=body["input_ids"],
            max_tokens=parameters.get("max_new_tokens", 256),
            temperature=parameters.get("temperature", 1.0),
            stop_ids=frozenset(token for token in stop if isinstance(token, int)),
            stop_texts=tuple(text for text in stop if isinstance(text, str)),
        )

    def _reply_sglang(
        self, generation: Generation, output: list[int], logprobs: list[float], matched: int | str | None
    ) -> dict[str, Any]:
        reason: object = {"type": "length", "length": generation.max_tokens}
        # SGLang looks at the limit first: a turn that ends with its last possible token is said to be cut.
        if matched is not None and len(output) < generation.max_tokens:
            reason = {"type": "stop", "matched": matched}
        return {
            "text": self._tokenizer.decode(output, skip_special_tokens=True),
            "meta_info": {
                "finish_reason": "stop" if self.dialect == "tinker" else reason,
                "prompt_tokens": len(generation.prompt_ids),
                "completion_tokens": len(output),
                "output_token_logprobs": [[logprob, token, None] for token, logprob in zip(output, logprobs, strict=True)],
            },
        }

    def _reply_vllm(
        self, generation: Generation, output: list[int], logprobs: list[float], matched: int | str | None
    ) -> dict[str, Any]:
        return {
            "text": [self._tokenizer.decode(output, skip_special_tokens=True)],
            "prompt": self._tokenizer.decode(generation.prompt_ids),
            "finish_reasons": ["length" if matched is None else "stop"],
            "logprobs": [[[{token: logprob}] for token, logprob in zip(output, logprobs, strict=True)]],
            "prompt_token_ids": generation.prompt_ids,
            "token_ids": [output],
        }
