"""`transformers` on the CPU as an inference engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from tests.real_engines.generate_server import Completion, GenerateServer
from tests.real_engines.tiny_model import TinyModel


class TransformersEngine(GenerateServer):
    """Samples with the library's own `generate`, which keeps keys and values of earlier tokens, one request at a time."""

    def __init__(self, model: TinyModel, seed: int = 3) -> None:
        super().__init__()
        self._network = model.network
        self._seed = seed
        self._one_at_a_time = asyncio.Lock()

    async def complete(
        self, prompt_ids: Sequence[int], max_tokens: int, temperature: float, stop_ids: Sequence[int]
    ) -> Completion:
        async with self._one_at_a_time:
            self._seed += 1
            return await asyncio.to_thread(self._sample, prompt_ids, max_tokens, temperature, stop_ids)

    def _sample(self, prompt_ids: Sequence[int], max_tokens: int, temperature: float, stop_ids: Sequence[int]) -> Completion:
        config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=max_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = torch.tensor([list(prompt_ids)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            generated = self._network.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        tokens = generated.sequences[0, len(prompt_ids) :]
        logprobs = torch.log_softmax(torch.cat(generated.logits).double(), dim=-1).gather(1, tokens.unsqueeze(1))[:, 0]
        return Completion(tokens.tolist(), logprobs.tolist(), int(tokens[-1]) in stop_ids)
