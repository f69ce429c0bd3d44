"""An inference engine that takes token ids and returns token ids with logprobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenacity import RetryError

from hermes_envs.errors import EngineError, InexactRolloutError
from hermes_envs.policies.token_record import check_logprobs
from hermes_envs.policies.token_servers import Completions, exact_server_class
from hermes_envs.rendering.chat_renderer import ChatRenderer

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_manager import ServerManager

HEALTH_POLL_S = 1.0


@dataclass(frozen=True)
class Sample:
    """One completion. `truncated`: the engine cut it at its limit, the model had not ended its turn."""

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool


class TokenEngine:
    """Samples completions through atroposlib's servers and lets nothing through that could not be training data.

    atroposlib tries a request three times, so a refused connection or a server error is final when it arrives here. Its health
    check (`health_check` of a server's config) makes requests wait without end while no server is healthy; after `patience_s`
    seconds of that the request is given up.

    How the engine is told where a turn ends depends on who listens: SGLang takes `stop_token_ids`, and text in `stop`; the
    Tinker trainer speaks SGLang's protocol but reads `stop` only, hence both; vLLM takes `stop_token_ids`. Text options of the
    engines (`skip_special_tokens` and the like) play no role: their text is never read.
    """

    def __init__(self, server: ServerManager, renderer: ChatRenderer, temperature: float, patience_s: float = 300.0) -> None:
        """`server` is made with `exact_server_class`.

        Raises:
            ConfigError: the servers cannot return token ids.
        """
        if not isinstance(server.servers[0], exact_server_class([one.config for one in server.servers])):
            raise TypeError("the server manager must be made with exact_server_class")
        self._server = server
        self._renderer = renderer
        self._patience_s = patience_s
        self._sampling: dict[str, Any] = {"n": 1, "temperature": temperature, "stop_token_ids": list(renderer.stop_token_ids)}
        if server.servers[0].config.server_type == "sglang":
            self._sampling["stop"] = list(renderer.stop_texts)

    async def sample(self, prompt_ids: Sequence[int], max_tokens: int) -> Sample:
        """Continue a prompt by at most `max_tokens` tokens.

        Raises:
            EngineError: the engine refused, timed out, or its answer is no completion.
            InexactRolloutError: the answer is one, but not to what was asked, or not to the letter.
        """
        _, outputs, logprobs, reasons = await self._ask(prompt_ids, max_tokens)
        if not len(outputs) == len(logprobs) == len(reasons) == 1:
            raise EngineError(f"the engine returned {len(outputs)} completions where one was asked for")
        self._check_tokens(outputs[0], max_tokens)
        check_logprobs(outputs[0], logprobs[0])
        return Sample(outputs[0], logprobs[0], self._was_truncated(outputs[0], max_tokens, _reason(reasons[0])))

    async def _ask(self, prompt_ids: Sequence[int], max_tokens: int) -> Completions:
        call: asyncio.Future[Completions] = asyncio.ensure_future(
            self._server.tokens_and_logprobs_completion(input_ids=list(prompt_ids), max_tokens=max_tokens, **self._sampling)
        )
        healthy_at = time.monotonic()
        try:
            while not (await asyncio.wait({call}, timeout=HEALTH_POLL_S))[0]:
                if any(server.server_healthy for server in self._server.servers):
                    healthy_at = time.monotonic()
                elif time.monotonic() - healthy_at > self._patience_s:
                    raise EngineError(f"no engine has been healthy for {self._patience_s:g} s: {self._addresses()}")
            return call.result()
        except RetryError as error:
            cause = error.last_attempt.exception()
            if isinstance(cause, EngineError):
                raise cause from None
            raise EngineError(f"the engine at {self._addresses()} failed: {type(cause).__name__}: {cause}") from cause
        finally:
            call.cancel()

    def _addresses(self) -> str:
        return ", ".join(str(server.config.base_url) for server in self._server.servers)

    def _check_tokens(self, token_ids: Sequence[Any], max_tokens: int) -> None:
        if not token_ids:
            raise EngineError("the engine returned no token; does it return logprobs?")
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._renderer.vocabulary_size:
                raise InexactRolloutError(f"the engine returned {token!r} as a token; is it serving another model?")
        if len(token_ids) > max_tokens:
            raise InexactRolloutError(f"the engine returned {len(token_ids)} tokens where at most {max_tokens} were asked for")
        if any(token in self._renderer.stop_token_ids for token in token_ids[:-1]):
            raise InexactRolloutError("the engine went on after a stop token")

    def _was_truncated(self, token_ids: Sequence[int], max_tokens: int, reason: str) -> bool:
        """By the tokens rather than by the reason: SGLang says `length` of a turn that ends at the limit, Tinker always `stop`.

        Raises: EngineError, InexactRolloutError: the completion was aborted, or lacks the stop token that ended it.
        """
        if reason == "abort":
            raise EngineError("the engine aborted the request")
        if token_ids[-1] in self._renderer.stop_token_ids:
            return False
        if reason != "stop" or len(token_ids) == max_tokens:
            return True
        # The model may have spelled a stop token in ordinary tokens, at which an engine that stops by text stops.
        text = self._renderer.decode(token_ids)
        if not any(stop in text for stop in self._renderer.stop_texts):
            raise InexactRolloutError(
                f"the engine ended a turn at {self._renderer.decode(token_ids[-1:])!r}, which is no stop token "
                f"({', '.join(self._renderer.stop_texts)}): it does not return the stop token, or has others"
            )
        return False


def _reason(finish_reason: object) -> str:
    """SGLang's reason is an object with its `type`, that of the others a text."""
    return str(finish_reason.get("type")) if isinstance(finish_reason, dict) else str(finish_reason)
