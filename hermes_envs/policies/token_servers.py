"""atroposlib's servers, asked for token ids, with nothing lost of what the engine says about its answer.

atroposlib's own requests drop how many prompt tokens the engine saw and which tokens it sampled beside those that have
logprobs, and take away a doubled beginning-of-sequence token: an answer to another prompt, or to a part of ours, would pass for
training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.envs.server_handling.sglang_server import SGLangServer
from atroposlib.envs.server_handling.vllm_server import VLLMServer

from hermes_envs.errors import ConfigError, EngineError, InexactRolloutError

Completions = tuple[list[int], list[list[Any]], list[list[Any]], list[Any]]
"""The prompt, and for each completion its tokens, its logprobs and why it ended: atroposlib's form."""


class ExactSGLangServer(SGLangServer):  # type: ignore[misc]
    """SGLang's `/generate`, which the Tinker trainer speaks, too."""

    async def _tokens_and_logprobs_completion_wrapper(
        self, *, model: str, input_ids: list[int], max_tokens: int, **sampling: Any
    ) -> Completions:
        request = {
            "input_ids": input_ids,
            "sampling_params": {**sampling, "max_new_tokens": max_tokens},
            "return_logprob": True,
            "return_text_in_logprobs": False,
        }
        reply = await _generate(self.config, request)
        answers = [_read_sglang(input_ids, answer) for answer in (reply if isinstance(reply, list) else [reply])]
        return (
            input_ids,
            [answer[0] for answer in answers],
            [answer[1] for answer in answers],
            [answer[2] for answer in answers],
        )


class ExactVLLMServer(VLLMServer):  # type: ignore[misc]
    """`/generate` of the vLLM server that comes with atroposlib."""

    async def _tokens_and_logprobs_completion_wrapper(
        self, *, model: str, input_ids: list[int], max_tokens: int, **sampling: Any
    ) -> Completions:
        request = {"prompt": {"prompt_token_ids": input_ids}, "logprobs": 0, "max_tokens": max_tokens, **sampling}
        reply = await _generate(self.config, request)
        _check_prompt(input_ids, reply.get("prompt_token_ids"))
        outputs, logprobs = [], []
        for place, entries in enumerate(reply["logprobs"]):
            if not all(entry and entry[0] for entry in entries):
                raise EngineError("the engine returned a token without a logprob")
            tokens = [int(next(iter(entry[0]))) for entry in entries]
            _check_outputs(tokens, reply["token_ids"][place] if reply.get("token_ids") else None)
            outputs.append(tokens)
            logprobs.append([next(iter(entry[0].values())) for entry in entries])
        return input_ids, outputs, logprobs, reply["finish_reasons"]


_SERVERS: dict[str, type[APIServer]] = {"sglang": ExactSGLangServer, "vllm": ExactVLLMServer}


def exact_server_class(configs: Sequence[APIServerConfig]) -> type[APIServer]:
    """The class for atroposlib's `ServerManager`.

    Raises:
        ConfigError: the servers are of different types, or of one that returns no token ids.
    """
    kinds = sorted({config.server_type for config in configs})
    if len(kinds) != 1 or kinds[0] not in _SERVERS:
        raise ConfigError(f"openai.server_type: policy tokens needs token ids: sglang or vllm, not {' and '.join(kinds)}")
    return _SERVERS[kinds[0]]


async def _generate(config: APIServerConfig, request: dict[str, Any]) -> Any:
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    timeout = aiohttp.ClientTimeout(total=config.timeout)
    url = f"{config.base_url.removesuffix('/').removesuffix('/v1')}/generate"
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
        session.post(url, json=request) as response,
    ):
        response.raise_for_status()
        return await response.json()


def _read_sglang(prompt_ids: list[int], answer: Any) -> tuple[list[Any], list[Any], Any]:
    if not isinstance(answer, dict):
        raise EngineError(f"the engine's answer is no object but {str(answer)[:100]}")
    about = answer.get("meta_info") or {}
    entries = about.get("output_token_logprobs") or []
    tokens = [entry[1] for entry in entries]
    seen, sampled = about.get("prompt_tokens"), about.get("completion_tokens")
    if seen is not None and seen != len(prompt_ids):
        raise InexactRolloutError(f"the engine continued a prompt of {seen} tokens where {len(prompt_ids)} were sent")
    if sampled is not None and sampled != len(tokens):
        raise InexactRolloutError(f"the engine sampled {sampled} tokens and returned {len(tokens)} with their logprobs")
    _check_outputs(tokens, answer.get("output_ids"))
    return tokens, [entry[0] for entry in entries], about.get("finish_reason")


def _check_prompt(prompt_ids: list[int], seen: list[int] | None) -> None:
    if seen is not None and seen != prompt_ids:
        raise InexactRolloutError(
            f"the engine continued another prompt, of {len(seen)} tokens where {len(prompt_ids)} were sent"
        )


def _check_outputs(tokens: list[Any], sampled: list[int] | None) -> None:
    # Some versions leave out the stop token here, and here alone.
    if sampled is not None and sampled not in (tokens, tokens[:-1]):
        raise InexactRolloutError(f"the engine sampled {len(sampled)} tokens and returned others, {len(tokens)}, with logprobs")
