"""Between the protocol's messages and what the model works with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from aiohttp import web
from google.protobuf.message import Message
from numpy.typing import NDArray
from pydantic import BaseModel
from tinker import types
from tinker.proto import tinker_public_pb2 as messages

from tests.tinker_service.errors import RequestRefused
from tests.tinker_service.sampling import SamplingJob, SamplingResult
from tests.tinker_service.training import Example, LossResult

_DTYPES = {messages.DTYPE_FLOAT32: numpy.float32, messages.DTYPE_INT64: numpy.int64}
_STOP_REASONS = {"stop": messages.STOP_REASON_STOP, "length": messages.STOP_REASON_LENGTH}


def response(reply: BaseModel | Message) -> web.Response:
    """An HTTP response: protobuf for what the SDK reads as such, else JSON."""
    if isinstance(reply, Message):
        return web.Response(body=reply.SerializeToString(), content_type="application/x-protobuf")
    return web.json_response(text=reply.model_dump_json())


def examples(data: Sequence[messages.Datum]) -> list[Example]:
    """The sequences of a forward_backward request.

    Raises:
        RequestRefused: A chunk is not text, or a tensor is sparse or of an unknown type.
    """
    return [
        Example(
            tokens=[token for chunk in datum.model_input for token in _tokens(chunk)],
            inputs={name: _array(name, tensor) for name, tensor in datum.loss_fn_inputs.items()},
        )
        for datum in data
    ]


def loss_config(request: messages.ForwardBackwardRequest) -> dict[str, float]:
    """The numbers of a request's loss_fn_config.

    Raises:
        RequestRefused: There is text among them.
    """
    if texts := [name for name, value in request.loss_fn_config_v2.items() if value.WhichOneof("value") != "number"]:
        raise RequestRefused(f"loss_fn_config: {sorted(texts)} must be numbers")
    return {name: value.number for name, value in request.loss_fn_config_v2.items()}


def loss_message(result: LossResult) -> messages.ForwardBackwardOutput:
    """What a client gets for forward_backward."""
    message = messages.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": result.total})
    record = message.loss_fn_outputs.add(num_datums=len(result.logprobs))
    logprobs = record.fields["logprobs"]
    logprobs.dtype = messages.DTYPE_FLOAT32
    logprobs.data = b"".join(array.astype(numpy.float32).tobytes() for array in result.logprobs)
    sizes = [0, *(array.size * numpy.dtype(numpy.float32).itemsize for array in result.logprobs)]
    logprobs.offsets = numpy.cumsum(sizes, dtype=numpy.int64).tobytes()
    return message


def sampling_job(
    request: types.SampleRequest, end_token: int | None, context_length: int, vocabulary_size: int, seed: tuple[int, ...]
) -> SamplingJob:
    """What to sample for a request; `seed` is for those that name none.

    Raises:
        RequestRefused: The request asks for what a model of these sizes, or this service, cannot do.
    """
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k"):
        if getattr(request, name):
            raise RequestRefused(f"this service knows no {name}")
    if not all(isinstance(chunk, types.EncodedTextChunk) for chunk in request.prompt.chunks):
        raise RequestRefused("the prompt must be text, as tokens")
    prompt, params = request.prompt.to_ints(), request.sampling_params
    if not prompt or min(prompt) < 0 or max(prompt) >= vocabulary_size:
        raise RequestRefused(f"the prompt must be at least one token, with ids below {vocabulary_size}")
    max_tokens = context_length - len(prompt) if params.max_tokens is None else params.max_tokens
    if max_tokens < 1 or request.num_samples < 1:
        raise RequestRefused(f"max_tokens is {max_tokens} and num_samples {request.num_samples}: both must be 1 at least")
    if len(prompt) + max_tokens > context_length:
        raise RequestRefused(
            f"prompt length plus max_tokens exceeds the model's context window: {len(prompt)} + {max_tokens} > {context_length}"
        )
    if params.temperature < 0 or params.top_k == 0 or params.top_p <= 0:
        raise RequestRefused("temperature must not be negative, top_k and top_p must leave a token in")
    stop_ids, stop_texts = _stops(params.stop, end_token)
    score_from = len(prompt) - request.prompt_logprobs_last_n if request.prompt_logprobs_last_n else 0
    return SamplingJob(
        prompt=prompt,
        num_samples=request.num_samples,
        max_tokens=max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        stop_ids=stop_ids,
        stop_texts=stop_texts,
        seed=seed if params.seed is None else (params.seed % 2**64,),
        score_prompt_from=score_from if request.prompt_logprobs else None,
    )


def sample_message(result: SamplingResult) -> messages.SampleResponse:
    """What a client gets for a sampling request."""
    message = messages.SampleResponse()
    for completion in result.completions:
        message.sequences.add(
            stop_reason=_STOP_REASONS[completion.stop_reason],
            tokens=numpy.array(completion.tokens, numpy.int32).tobytes(),
            logprobs=numpy.array(completion.logprobs, numpy.float32).tobytes(),
        )
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.tobytes()
    return message


def _tokens(chunk: messages.Chunk) -> list[int]:
    if chunk.WhichOneof("chunk") != "encoded_text":
        raise RequestRefused("the model input must be text, as tokens")
    return numpy.frombuffer(chunk.encoded_text.tokens, numpy.int32).tolist()


def _array(name: str, tensor: messages.Tensor) -> NDArray[numpy.float32] | NDArray[numpy.int64]:
    if tensor.WhichOneof("encoding") != "dense" or tensor.dtype not in _DTYPES:
        raise RequestRefused(f"{name} must be a dense tensor of float32 or int64")
    flat = numpy.frombuffer(tensor.dense, _DTYPES[tensor.dtype])
    return flat.reshape(tuple(tensor.shape) or flat.shape)


def _stops(stop: str | Sequence[str] | Sequence[int] | None, end_token: int | None) -> tuple[frozenset[int], tuple[str, ...]]:
    """Token ids and texts that end a completion. Without any named, the tokenizer's end token does."""
    if stop is None:
        return frozenset(() if end_token is None else (end_token,)), ()
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise RequestRefused("an empty text cannot stop a completion")
    return frozenset(s for s in stops if isinstance(s, int)), tuple(s for s in stops if isinstance(s, str))
