"""One inference server that is asked by token ids, and what it must say of its answer.

An answer to another prompt, to a part of the prompt, or with tokens or logprobs missing would pass for training data. So
everything that a server says about its answer is held against the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hermes_envs.errors import ConfigError, EngineUnavailableError, InexactRolloutError
from hermes_envs.policies.endpoint import Endpoint

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig


@dataclass(frozen=True)
class TokenRequest:
    """A prompt to continue by at most `max_tokens` tokens, and where a turn ends."""

    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    stop_token_ids: list[int]
    stop_texts: list[str]


@dataclass(frozen=True)
class Completion:
    """What was sampled, not yet checked: token ids, their logprobs, and why it ended (`stop`, `length`)."""

    token_ids: list[Any]
    logprobs: list[Any]
    finish_reason: str


class TokenEndpoint(Endpoint):
    """Asks `POST /generate` in the form of the config's `server_type`.

    `sglang` is SGLang's own, which the Tinker trainer speaks, too; `vllm` is that of the server which comes with atroposlib.
    Where a turn ends is told each server as it listens: SGLang takes `stop_token_ids`, and text in `stop`; the Tinker trainer
    reads `stop` only, hence both; vLLM takes `stop_token_ids`. The servers' text is never read.
    """

    def __init__(self, config: APIServerConfig) -> None:
        """Raises: ConfigError: as `Endpoint` and `check_server_type`."""
        super().__init__(config)
        check_server_type(config)
        self._is_vllm = config.server_type == "vllm"

    async def complete(self, request: TokenRequest) -> Completion:
        """Ask for one completion.

        Raises:
            EngineError: as `Endpoint.post`, or the server aborted the request.
            InexactRolloutError: the answer is not one completion, or not of this prompt, or lacks tokens or logprobs.
        """
        reply = await self.post(f"{self.root}/generate", (_vllm_body if self._is_vllm else _sglang_body)(request))
        try:
            completion = (_read_vllm if self._is_vllm else _read_sglang)(request.prompt_ids, reply)
        except (AttributeError, LookupError, TypeError, ValueError) as reason:
            what = f"has not the form of {self.config.server_type}: {type(reason).__name__}: {reason}"
            raise InexactRolloutError(f"the answer of {self.address} {what}") from reason
        if completion.finish_reason == "abort":
            raise EngineUnavailableError(f"the engine at {self.address} aborted the request")
        return completion


def check_server_type(config: APIServerConfig) -> None:
    """Raises: ConfigError: the server is of a type that returns no token ids."""
    if config.server_type not in ("sglang", "vllm"):
        raise ConfigError(f"openai.server_type: policy tokens needs token ids: sglang or vllm, not {config.server_type}")


def _sglang_body(request: TokenRequest) -> dict[str, Any]:
    sampling = {**_sampling(request), "stop": request.stop_texts, "max_new_tokens": request.max_tokens}
    options = {"return_logprob": True, "return_text_in_logprobs": False}
    return {"input_ids": request.prompt_ids, "sampling_params": sampling, **options}


def _vllm_body(request: TokenRequest) -> dict[str, Any]:
    options = {"max_tokens": request.max_tokens, "logprobs": 0}
    return {"prompt": {"prompt_token_ids": request.prompt_ids}, **_sampling(request), **options}


def _sampling(request: TokenRequest) -> dict[str, Any]:
    return {"n": 1, "temperature": request.temperature, "stop_token_ids": request.stop_token_ids}


def _read_sglang(prompt_ids: list[int], reply: Any) -> Completion:
    answer = _only(reply if isinstance(reply, list) else [reply])
    if not isinstance(answer, dict):
        raise InexactRolloutError(f"the engine's answer is no object but {str(answer)[:100]}")
    about = answer.get("meta_info") or {}
    entries = about.get("output_token_logprobs") or []
    tokens = [entry[1] for entry in entries]
    seen, sampled = about.get("prompt_tokens"), about.get("completion_tokens")
    if seen is not None and seen != len(prompt_ids):
        raise InexactRolloutError(f"the engine continued a prompt of {seen} tokens where {len(prompt_ids)} were sent")
    if sampled is not None and sampled != len(tokens):
        raise InexactRolloutError(f"the engine sampled {sampled} tokens and returned {len(tokens)} with their logprobs")
    _check_outputs(tokens, answer.get("output_ids"))
    # SGLang's reason is an object, the Tinker trainer's a text.
    reason = about.get("finish_reason")
    return Completion(tokens, [entry[0] for entry in entries], str(reason.get("type") if isinstance(reason, dict) else reason))


def _read_vllm(prompt_ids: list[int], reply: Any) -> Completion:
    seen, sampled = reply.get("prompt_token_ids"), reply.get("token_ids")
    if seen is not None and seen != prompt_ids:
        raise InexactRolloutError(
            f"the engine continued another prompt, of {len(seen)} tokens where {len(prompt_ids)} were sent"
        )
    entries, reason = _only(reply["logprobs"]), _only(reply["finish_reasons"])
    if not all(entry and entry[0] for entry in entries):
        raise InexactRolloutError("the engine returned a token without a logprob")
    tokens = [int(next(iter(entry[0]))) for entry in entries]
    _check_outputs(tokens, sampled[0] if sampled else None)
    return Completion(tokens, [next(iter(entry[0].values())) for entry in entries], str(reason))


def _only(completions: Sequence[Any]) -> Any:
    if len(completions) != 1:
        raise InexactRolloutError(f"the engine returned {len(completions)} completions where one was asked for")
    return completions[0]


def _check_outputs(tokens: list[Any], sampled: list[int] | None) -> None:
    # Some versions leave out the stop token here, and here alone.
    if sampled is not None and sampled not in (tokens, tokens[:-1]):
        raise InexactRolloutError(f"the engine sampled {len(sampled)} tokens and returned others, {len(tokens)}, with logprobs")
