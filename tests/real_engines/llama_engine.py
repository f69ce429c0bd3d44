"""llama.cpp's server as an inference engine that is asked by token ids.

What it takes for exact data, found with version 0.7.0:

- `samplers` with nothing but the temperature: by default it samples among the 40 likeliest tokens, less those that top-p and
  min-p cut off, while the logprobs are those of the whole distribution. Either way they are those of temperature 1, as vLLM's.
- `return_tokens`: the stop token is among the tokens, and has a logprob.
- A token at which the text is not whole UTF-8 gets no logprob: its entry is lost, and the next one's `bytes` are those of
  both. It is asked for by another request that must say the end token there and returns the logprobs of all tokens; a logit
  bias leaves them as they are. With a large vocabulary that is megabytes for a part of an emoji: for a test, not for training.
- `EXACT_OPTIONS`: with them logprobs agree with a forward pass of `transformers` to 0.00001. Flash attention, on by default,
  moves them by up to 0.05, and keys and values in 16 bits, the default, by up to 0.0003 without it.

Where a turn ends it decides by the model's file: its end tokens must be those of the renderer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp
from transformers import PreTrainedTokenizerFast

from tests.real_engines.generate_server import Completion, GenerateServer

EXACT_OPTIONS = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")

CERTAIN = 1e6
"""A logit bias that leaves no other choice."""


class LlamaEngine(GenerateServer):
    """Translates to `POST /completion` of the server at `llama_url`.

    `samplers` None leaves the server its own. `recovered` counts logprobs that had to be asked for again.
    """

    def __init__(
        self,
        llama_url: str,
        tokenizer: PreTrainedTokenizerFast,
        samplers: Sequence[str] | None = ("temperature",),
        seed: int = 3,
    ) -> None:
        super().__init__()
        self.recovered = 0
        self._samplers = {} if samplers is None else {"samplers": list(samplers)}
        self._seed = seed
        self._url = f"{llama_url}/completion"
        self._end_token = tokenizer.eos_token_id
        self._vocabulary_size = len(tokenizer)
        self._byte_counts = _byte_counts(tokenizer)

    async def __aenter__(self) -> LlamaEngine:
        self._session = aiohttp.ClientSession(raise_for_status=True)
        await super().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        await self._session.close()

    async def complete(
        self, prompt_ids: Sequence[int], max_tokens: int, temperature: float, stop_ids: Sequence[int]
    ) -> Completion:
        reply = await self._ask(prompt_ids, max_tokens, temperature=temperature, n_probs=1)
        tokens: list[int] = reply["tokens"]
        logprobs = self._aligned(tokens, reply.get("completion_probabilities", []))
        for place, logprob in enumerate(logprobs):
            if logprob is None:
                logprobs[place] = await self._logprob([*prompt_ids, *tokens[:place]], tokens[place])
                self.recovered += 1
        return Completion(tokens, [logprob for logprob in logprobs if logprob is not None], reply["stop_type"] == "eos")

    async def _ask(self, prompt_ids: Sequence[int], max_tokens: int, **parameters: Any) -> dict[str, Any]:
        self._seed += 1
        request = {"prompt": list(prompt_ids), "n_predict": max_tokens, "return_tokens": True, "seed": self._seed}
        async with self._session.post(self._url, json=request | self._samplers | parameters) as response:
            reply: dict[str, Any] = await response.json()
        assert reply["tokens_evaluated"] == len(prompt_ids), "the server shortened the prompt or added to it"
        assert not reply["truncated"]
        assert reply["tokens_predicted"] == len(reply["tokens"])
        return reply

    def _aligned(self, tokens: Sequence[int], entries: list[dict[str, Any]]) -> list[float | None]:
        """Each token's logprob, None where its entry is lost: an entry's bytes are those of the lost ones before it, too."""
        logprobs: list[float | None] = []
        waiting, pending = iter(entries), 0
        entry = next(waiting, None)
        for token in tokens:
            pending += self._byte_counts[token]
            if entry is not None and entry["id"] == token and len(entry["bytes"]) == pending:
                logprobs.append(entry["logprob"])
                entry, pending = next(waiting, None), 0
            else:
                logprobs.append(None)
        assert entry is None, "a logprob belongs to no token"
        return logprobs

    async def _logprob(self, context: Sequence[int], token: int) -> float:
        """The logprob of a token after `context`."""
        reply = await self._ask(context, 1, n_probs=self._vocabulary_size, logit_bias=[[self._end_token, CERTAIN]])
        assert reply["tokens"] == [self._end_token]
        (entry,) = reply["completion_probabilities"]
        return next(float(other["logprob"]) for other in entry["top_logprobs"] if other["id"] == token)


def _byte_counts(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """How many bytes each token has in the server's text, where special tokens are left out."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # Byte-level BPE writes each byte of a learned token as one character.
    counts = [len(name) for name in names]
    for id, token in tokenizer.added_tokens_decoder.items():
        counts[id] = 0 if token.special else len(token.content.encode())
    return counts
