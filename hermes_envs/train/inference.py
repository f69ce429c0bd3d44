"""The model that is being trained, over HTTP: SGLang's `/generate`, and OpenAI's completions and chat completions.

    POST /generate             {"input_ids", "sampling_params"?} -> {"text", "meta_info"}, with token ids and logprobs
    POST /v1/completions       {"prompt", ...} -> an OpenAI completion
    POST /v1/chat/completions  {"messages", "tools"?, ...} -> an OpenAI chat completion
    GET  /health               -> {"status", "model", "step"}

A parameter that the Tinker service cannot honour is refused by name, never ignored.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.policies.base import assistant_message, with_text_arguments
from hermes_envs.rendering.chat_renderer import UNSUITABLE, ChatRenderer
from hermes_envs.services.http_service import Body, HttpService, RefusalError, get, post
from hermes_envs.services.options import ServiceOptions
from hermes_envs.train.tinker_model import Completion, RefusedSampleError, SamplingRequest, TinkerModel

_MOST_COMPLETIONS = 1024
_MOST_TOKENS = 1_000_000


def _listed(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


Stop = Annotated[list[str | int], BeforeValidator(_listed)]
"""A text, or a list of texts and token ids."""


class GenerateParameters(Body):
    """SGLang's `sampling_params`, as far as Tinker has them. `skip_special_tokens` is about the text of the reply."""

    n: int = Field(1, ge=1, le=_MOST_COMPLETIONS)
    max_new_tokens: int = Field(256, ge=1, le=_MOST_TOKENS)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, le=_MOST_TOKENS)
    sampling_seed: int | None = None
    stop: Stop = Field([])
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool = True


class GenerateRequest(Body):
    """SGLang's request. What it can ask of the form of the reply changes nothing: logprobs are always there."""

    input_ids: Annotated[list[int], FailFast()]
    sampling_params: GenerateParameters = GenerateParameters()
    return_logprob: bool = True
    return_text_in_logprobs: bool = False


class OpenAIRequest(Body):
    """What OpenAI's two requests share, as far as Tinker has it."""

    model: str = ""
    n: int = Field(1, ge=1, le=_MOST_COMPLETIONS)
    max_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: Stop = Field([])
    stream: Literal[False] | None = None
    user: str | None = None


class CompletionRequest(OpenAIRequest):
    """Continue a text, or each of several."""

    prompt: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class ChatRequest(OpenAIRequest):
    """Answer messages."""

    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: Literal["auto"] | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)


class InferenceServer:
    """Answers with the weights published last. Requests that come before there is a model wait for it."""

    def __init__(self, name: str, tokenizer: Any, renderer: Callable[[], ChatRenderer], options: ServiceOptions) -> None:
        """`renderer` is called for chat completions only: `/generate` works for a tokenizer that no renderer suits."""
        self._name = name
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._model: asyncio.Future[TinkerModel] = asyncio.get_running_loop().create_future()
        self.step = 0
        routes = (
            post("/generate", GenerateRequest, self._generate),
            post("/v1/completions", CompletionRequest, self._complete),
            post("/v1/chat/completions", ChatRequest, self._chat),
            get("/health", self._health),
        )
        self.service = HttpService(routes, options)

    def use(self, model: TinkerModel) -> None:
        """Sample from this model from now on."""
        self._model.set_result(model)

    def published(self, step: int) -> None:
        """Set the training step that `/health` gives for the weights that are sampled from."""
        self.step = step

    async def _generate(self, request: GenerateRequest) -> Any:
        wanted = request.sampling_params
        completions = await self._sample(
            SamplingRequest(
                self._token_ids("input_ids", request.input_ids),
                wanted.max_new_tokens,
                n=wanted.n,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                top_k=wanted.top_k,
                seed=wanted.sampling_seed,
                stop=self._stop(wanted.stop, wanted.stop_token_ids or []),
            )
        )
        replies = [
            {
                "text": self._text(completion.token_ids, skip_special_tokens=wanted.skip_special_tokens),
                "meta_info": {
                    "prompt_tokens": len(request.input_ids),
                    "completion_tokens": len(completion.token_ids),
                    "finish_reason": {"type": "length" if completion.truncated else "stop"},
                    "output_token_logprobs": [
                        [logprob, token, None] for logprob, token in zip(completion.logprobs, completion.token_ids, strict=True)
                    ],
                },
            }
            for completion in completions
        ]
        return replies if wanted.n > 1 else replies[0]

    async def _complete(self, request: CompletionRequest) -> dict[str, Any]:
        encoded = [self._token_ids("prompt", self._tokenizer.encode(prompt)) for prompt in request.prompt]
        stop = self._stop(request.stop, [])
        answers = await asyncio.gather(
            *(self._sample(_openai_sampling(request, prompt, request.max_tokens or 16, stop)) for prompt in encoded)
        )
        completions = [completion for answer in answers for completion in answer]
        choices = [
            {
                "index": index,
                "text": self._text(completion.token_ids),
                "logprobs": None,
                "finish_reason": "length" if completion.truncated else "stop",
            }
            for index, completion in enumerate(completions)
        ]
        return self._openai_reply("text_completion", choices, sum(map(len, encoded)), completions)

    async def _chat(self, request: ChatRequest) -> dict[str, Any]:
        tools = request.tools or []
        try:
            renderer = self._renderer()
        except ConfigError as reason:
            raise RefusalError(str(reason), 501, "no_renderer") from reason
        try:
            prompt = renderer.prompt(request.messages, tools)
        except (ConfigError, EngineError, *UNSUITABLE) as reason:
            raise RefusalError(f"the messages or tools cannot be rendered: {type(reason).__name__}: {reason}") from reason
        stop = self._stop(request.stop, list(renderer.stop_token_ids))
        most = request.max_completion_tokens or request.max_tokens or 256
        completions = await self._sample(_openai_sampling(request, prompt, most, stop))
        choices = [
            {"index": index, "logprobs": None, **self._chat_choice(renderer, completion, prompt, tools)}
            for index, completion in enumerate(completions)
        ]
        return self._openai_reply("chat.completion", choices, len(prompt), completions)

    def _chat_choice(
        self, renderer: ChatRenderer, completion: Completion, prompt: list[int], tools: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        answer = renderer.parse(completion.token_ids, prompt, tools, f"call_{secrets.token_hex(6)}")
        message = with_text_arguments(assistant_message(answer.content, answer.tool_calls, answer.reasoning))
        reason = "length" if completion.truncated else "tool_calls" if answer.tool_calls else "stop"
        return {"message": message, "finish_reason": reason}

    async def _health(self) -> dict[str, Any]:
        return {"status": "ok" if self._model.done() else "loading", "model": self._name, "step": self.step}

    async def _sample(self, request: SamplingRequest) -> list[Completion]:
        model = await asyncio.shield(self._model)
        try:
            return await model.sample(request)
        except RefusedSampleError as reason:
            raise RefusalError(str(reason)) from reason
        except EngineError as reason:
            raise RefusalError(str(reason), 502, "engine_failed") from reason

    def _token_ids(self, name: str, given: list[int]) -> list[int]:
        if not given:
            raise RefusalError(f"field {name!r} has no token")
        size = len(self._tokenizer)
        for token in given:
            if not 0 <= token < size:
                raise RefusalError(f"field {name!r}: {token!r} is no token of the vocabulary of {size}")
        return given

    def _stop(self, stop: Sequence[str | int], token_ids: Sequence[int]) -> list[int] | list[str] | None:
        """Where to stop. Tinker takes token ids or texts, not both: beside ids, texts of one token are turned into ids."""
        texts = [text for text in stop if isinstance(text, str)]
        ids = [token for token in stop if isinstance(token, int)] + [*token_ids]
        if "" in texts:
            raise RefusalError("field 'stop': a text is empty")
        if ids and texts:
            several = [text for text in texts if text not in self._vocabulary]
            if several:
                raise RefusalError(f"field 'stop': {several[0]!r} is not one token; Tinker takes no texts beside ids")
            ids, texts = [*ids, *(self._vocabulary[text] for text in texts)], []
        if ids:
            return list(dict.fromkeys(self._token_ids("stop", ids)))
        return texts or None

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        """Cached, since the tokenizer builds it anew at each call, which takes tens of milliseconds."""
        return dict(self._tokenizer.get_vocab())

    def _text(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _openai_reply(
        self, kind: str, choices: list[dict[str, Any]], prompt_tokens: int, completions: Sequence[Completion]
    ) -> dict[str, Any]:
        completion_tokens = sum(len(completion.token_ids) for completion in completions)
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self._name,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }


def _openai_sampling(
    request: OpenAIRequest, prompt: list[int], max_tokens: int, stop: list[int] | list[str] | None
) -> SamplingRequest:
    return SamplingRequest(
        prompt,
        max_tokens,
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=stop,
    )
