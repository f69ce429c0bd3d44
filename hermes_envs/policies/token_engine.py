"""Turns of a model, sampled by token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hermes_envs.errors import InexactRolloutError
from hermes_envs.policies.endpoints import Endpoints
from hermes_envs.policies.token_endpoint import TokenEndpoint, TokenRequest
from hermes_envs.rendering.chat_renderer import ChatRenderer


@dataclass(frozen=True)
class Sample:
    """One completion. `truncated`: the engine cut it at its limit, the model had not ended its turn."""

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool


class TokenEngine:
    """Samples turns, and accepts only tokens of the renderer's vocabulary that end where a turn may end."""

    def __init__(self, endpoints: Endpoints[TokenEndpoint], renderer: ChatRenderer, temperature: float) -> None:
        self._endpoints = endpoints
        self._renderer = renderer
        self._temperature = temperature

    async def sample(self, prompt_ids: list[int], max_tokens: int) -> Sample:
        """Continue a prompt by at most `max_tokens` tokens. The logprobs are as the engine sent them.

        Raises:
            EngineError: as `Endpoints.ask`.
            InexactRolloutError: the answer is not one to what was asked, or its tokens cannot be right.
        """
        request = TokenRequest(
            prompt_ids,
            max_tokens,
            self._temperature,
            stop_token_ids=list(self._renderer.stop_token_ids),
            stop_texts=list(self._renderer.stop_texts),
        )
        answer = await self._endpoints.ask(lambda endpoint: endpoint.complete(request))
        self._check_tokens(answer.token_ids, max_tokens)
        return Sample(
            answer.token_ids, answer.logprobs, self._was_truncated(answer.token_ids, max_tokens, answer.finish_reason)
        )

    def _check_tokens(self, token_ids: Sequence[Any], max_tokens: int) -> None:
        if not token_ids:
            raise InexactRolloutError("the engine returned no token; does it return logprobs?")
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._renderer.vocabulary_size:
                raise InexactRolloutError(f"the engine returned {token!r} as a token; is it serving another model?")
        if len(token_ids) > max_tokens:
            raise InexactRolloutError(f"the engine returned {len(token_ids)} tokens where at most {max_tokens} were asked for")
        if any(token in self._renderer.stop_token_ids for token in token_ids[:-1]):
            raise InexactRolloutError("the engine went on after a stop token")

    def _was_truncated(self, token_ids: Sequence[int], max_tokens: int, finish_reason: str) -> bool:
        """By the tokens rather than by the reason: SGLang says `length` of a turn that ends at the limit, Tinker always `stop`.

        Raises: InexactRolloutError: the completion lacks the stop token that ended it.
        """
        if token_ids[-1] in self._renderer.stop_token_ids:
            return False
        if finish_reason != "stop" or len(token_ids) == max_tokens:
            return True
        # The model may have spelled a stop token in ordinary tokens, at which an engine that stops by text stops.
        text = self._renderer.decode(token_ids)
        if not any(stop in text for stop in self._renderer.stop_texts):
            raise InexactRolloutError(
                f"the engine ended a turn at {self._renderer.decode(token_ids[-1:])!r}, which is no stop token "
                f"({', '.join(self._renderer.stop_texts)}): it does not return the stop token, or has others"
            )
        return False
