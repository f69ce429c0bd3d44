"""A small service that the `tinker` SDK (0.38) can train and sample with: a tiny model on one CPU core, over HTTP.

It answers what these calls send, and fails as they expect: sessions, `create_lora_training_client`,
`create_training_client_from_state` (`_with_optimizer`), `forward`, `forward_backward` (losses `cross_entropy`,
`importance_sampling`, `ppo`), `optim_step` (AdamW), `save_state`, `load_state` (`_with_optimizer`),
`save_weights_for_sampler`, `save_weights_and_get_sampling_client`, `create_sampling_client`, `sample`, `compute_logprobs`,
`get_info`, `get_tokenizer`, `RestClient.get_server_capabilities`.

Otherwise than the real one it trains all weights instead of a LoRA adapter, takes any key that begins with `tml-`, keeps the
samplers used last (`registry.SAMPLERS_KEPT`), and forgets everything but named checkpoints when it ends. Logprobs are those of
temperature 1, with all tokens in. Left out: images and audio, tensors of two dimensions (top-k distillation), the other losses,
custom losses on the server, optimizers beside AdamW, top-k and target logprobs, inflight samplers, expiry of checkpoints,
listing, publishing and exporting them, cancelling, `retrieve_futures`, JWTs, billing, back-pressure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pydantic
import torch
from aiohttp import web
from google.protobuf.message import DecodeError
from tinker import types
from tinker.proto import tinker_public_pb2 as messages
from transformers import PreTrainedTokenizerFast

from tests.tinker_service import wire
from tests.tinker_service.checkpoints import Checkpoints
from tests.tinker_service.errors import NotFound, RequestRefused
from tests.tinker_service.model import TinyModel, TinyModelOptions
from tests.tinker_service.promises import Promises, Reply
from tests.tinker_service.registry import Registry
from tests.tinker_service.training import TrainingRun
from tests.tinker_service.worker import Worker

Body = TypeVar("Body", bound=pydantic.BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class TinkerService:
    """A Tinker-compatible service on loopback: an async context manager. `base_url` is where it listens.

    `model_name` is the base model's name, by default the tokenizer's folder. `checkpoint_folder` keeps named checkpoints, by
    default for as long as the service runs. A request for a result that is not there yet waits `long_poll_s` before the client
    is told to try again.
    """

    def __init__(
        self,
        options: TinyModelOptions,
        tokenizer: PreTrainedTokenizerFast,
        *,
        model_name: str | None = None,
        checkpoint_folder: Path | None = None,
        port: int = 0,
        long_poll_s: float = 30.0,
        max_request_bytes: int = 2**25,
    ) -> None:
        self.model_name = model_name or tokenizer.name_or_path
        self._options = options
        self._tokenizer = tokenizer
        self._checkpoint_folder = checkpoint_folder
        self._port = port
        self._long_poll_s = long_poll_s
        self._max_request_bytes = max_request_bytes
        self._base = TinyModel(options).requires_grad_(False)
        self._registry = Registry()
        self._promises = Promises()

    async def __aenter__(self) -> TinkerService:
        torch.set_num_threads(1)
        async with AsyncExitStack() as stack:
            folder = self._checkpoint_folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._checkpoints = Checkpoints(folder)
            self._worker = await stack.enter_async_context(Worker(self._tokenizer.decode))
            app = web.Application(client_max_size=self._max_request_bytes, middlewares=[_refusals])
            app.add_routes(self._routes())
            app.on_shutdown.append(self._give_up)
            runner = web.AppRunner(app, shutdown_timeout=1.0)
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self._port).start()
            self.port: int = runner.addresses[0][1]
            self.base_url = f"http://127.0.0.1:{self.port}"
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _give_up(self, app: web.Application) -> None:
        await self._promises.close()

    def _routes(self) -> list[web.RouteDef]:
        posts = {
            "client/config": self._config,
            "client/dynamic_config": self._config,
            "telemetry": self._telemetry,
            "create_session": self._create_session,
            "session_heartbeat": self._heartbeat,
            "sessions/{session_id}/finish": self._finish_session,
            "create_model": self._create_model,
            "get_info": self._get_info,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "load_weights": self._load_weights,
            "create_sampling_session": self._create_sampling_session,
            "asample": self._asample,
            "retrieve_future": self._retrieve_future,
        }
        gets = {
            "healthz": self._health,
            "get_server_capabilities": self._capabilities,
            "samplers/{sampler_id}": self._get_sampler,
        }
        return [web.post(f"/api/v1/{path}", handler) for path, handler in posts.items()] + [
            web.get(f"/api/v1/{path}", handler) for path, handler in gets.items()
        ]

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _capabilities(self, request: web.Request) -> web.Response:
        model = types.SupportedModel(
            model_name=self.model_name, max_context_length=self._options.context_length, trainable=True, sampleable=True
        )
        return wire.response(types.GetServerCapabilitiesResponse(supported_models=[model]))

    async def _config(self, request: web.Request) -> web.Response:
        response = web.json_response({})
        # The SDK asks for its configuration through a client that it never closes: Python would warn of the open connection.
        response.force_close()
        return response

    async def _telemetry(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "accepted"})

    async def _create_session(self, request: web.Request) -> web.Response:
        await _body(request, types.CreateSessionRequest)
        return wire.response(types.CreateSessionResponse(session_id=self._registry.add_session()))

    async def _heartbeat(self, request: web.Request) -> web.Response:
        self._registry.session((await _body(request, types.SessionHeartbeatRequest)).session_id)
        return wire.response(types.SessionHeartbeatResponse())

    async def _finish_session(self, request: web.Request) -> web.Response:
        self._registry.finish_session(request.match_info["session_id"])
        return web.json_response({})

    async def _create_model(self, request: web.Request) -> web.Response:
        body = await _body(request, types.CreateModelRequest)
        session = self._registry.session(body.session_id)
        self._check_base_model(body.base_model)
        if body.lora_config is None or body.optimizer_config.type != "adamw":
            raise RequestRefused("this service needs a lora_config, and knows no optimizer but adamw")
        rank, model_id = body.lora_config.rank, f"{body.session_id}:train:{body.model_seq_id}"

        async def create() -> Reply:
            run = await self._worker.run(lambda: TrainingRun(self._base, rank))
            self._registry.add_model(model_id, session, run)
            return types.CreateModelResponse(model_id=model_id)

        return self._accepted(f"{model_id}:0", create, model_id=model_id)

    async def _get_info(self, request: web.Request) -> web.Response:
        model_id = (await _body(request, types.GetInfoRequest)).model_id
        data = types.ModelData(arch="tiny", model_name=self.model_name, tokenizer_id=self._tokenizer.name_or_path)
        rank = self._registry.model(model_id).run.rank
        return wire.response(
            types.GetInfoResponse(
                model_data=data, model_id=model_id, model_name=self.model_name, is_lora=True, lora_rank=rank, type="get_info"
            )
        )

    async def _forward_backward(self, request: web.Request) -> web.Response:
        message = messages.ForwardBackwardRequest.FromString(await request.read())
        run = self._registry.model(message.model_id).run

        async def perform() -> Reply:
            examples, config = wire.examples(message.data), wire.loss_config(message)
            result = await self._worker.run(
                lambda: run.forward_backward(examples, message.loss_fn, config, forward_only=message.forward_only)
            )
            return wire.loss_message(result)

        return self._in_turn(message.model_id, message.seq_id, perform)

    async def _optim_step(self, request: web.Request) -> web.Response:
        body = await _body(request, types.OptimStepRequest)
        run, params = self._registry.model(body.model_id).run, body.optim_params

        async def perform() -> Reply:
            if not isinstance(params, types.AdamParams):
                raise RequestRefused("this service knows no optimizer but adamw")
            betas, clip = (params.beta1, params.beta2), params.grad_clip_norm
            metrics = await self._worker.run(
                lambda: run.optim_step(params.learning_rate, betas, params.eps, params.weight_decay, clip)
            )
            return types.OptimStepResponse(metrics=metrics)

        return self._in_turn(body.model_id, body.seq_id, perform)

    async def _save_weights(self, request: web.Request) -> web.Response:
        body = await _body(request, types.SaveWeightsRequest)
        run, name = self._registry.model(body.model_id).run, body.path or f"{body.seq_id:06d}"

        async def perform() -> Reply:
            path = await self._worker.run(
                lambda: self._checkpoints.save(body.model_id, "weights", name, run.state(), overwrite=body.overwrite)
            )
            return types.SaveWeightsResponse(path=path, type="save_weights")

        return self._in_turn(body.model_id, body.seq_id, perform)

    async def _save_weights_for_sampler(self, request: web.Request) -> web.Response:
        body = await _body(request, types.SaveWeightsForSamplerRequest)
        model, name = self._registry.model(body.model_id), body.path

        async def perform() -> Reply:
            if body.kind != "snapshot":
                raise RequestRefused(f"this service knows no sampler of kind {body.kind!r}")
            if name is None:
                sampler_id = f"{body.model_id.partition(':')[0]}:sample:{body.sampling_session_seq_id}"
                self._registry.add_sampler(sampler_id, model.session, await self._worker.run(model.run.snapshot), None)
                return types.SaveWeightsForSamplerResponseInternal(sampling_session_id=sampler_id)
            state = {**model.run.state(), "optimizer": None}
            path = await self._worker.run(
                lambda: self._checkpoints.save(body.model_id, "sampler_weights", name, state, overwrite=True)
            )
            return types.SaveWeightsForSamplerResponseInternal(path=path)

        return self._in_turn(body.model_id, body.seq_id, perform)

    async def _load_weights(self, request: web.Request) -> web.Response:
        body = await _body(request, types.LoadWeightsRequest)
        if body.model_id is None:
            return await self._create_model_from_weights(body)
        run = self._registry.model(body.model_id).run

        async def perform() -> Reply:
            state = await self._worker.run(lambda: self._checkpoints.load(body.path))
            await self._worker.run(lambda: run.restore(state, optimizer=body.optimizer))
            return types.LoadWeightsResponse(path=body.path, model_id=body.model_id)

        return self._in_turn(body.model_id, body.seq_id, perform)

    async def _create_model_from_weights(self, body: types.LoadWeightsRequest) -> web.Response:
        session, model_id = self._registry.session(body.session_id), f"{body.session_id}:train:{body.model_seq_id}"
        state = await self._worker.run(lambda: self._checkpoints.load(body.path))

        async def create() -> Reply:
            run = await self._worker.run(lambda: TrainingRun(self._base, state["rank"]))
            await self._worker.run(lambda: run.restore(state, optimizer=body.optimizer))
            self._registry.add_model(model_id, session, run)
            return types.LoadWeightsResponse(path=body.path, model_id=model_id)

        return self._accepted(f"{model_id}:0", create, model_id=model_id)

    async def _create_sampling_session(self, request: web.Request) -> web.Response:
        body = await _body(request, types.CreateSamplingSessionRequest)
        session, path = self._registry.session(body.session_id), body.model_path
        sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
        if path is None:
            self._check_base_model(body.base_model)
            self._registry.add_sampler(sampler_id, session, self._base, None)
        else:

            def load() -> TinyModel:
                run = TrainingRun(self._base, rank=1)
                run.restore(self._checkpoints.load(path), optimizer=False)
                return run.snapshot()

            self._registry.add_sampler(sampler_id, session, await self._worker.run(load), path)
        return wire.response(types.CreateSamplingSessionResponse(sampling_session_id=sampler_id))

    async def _get_sampler(self, request: web.Request) -> web.Response:
        sampler_id = request.match_info["sampler_id"]
        path = self._registry.sampler(sampler_id).model_path
        return wire.response(types.GetSamplerResponse(sampler_id=sampler_id, base_model=self.model_name, model_path=path))

    async def _asample(self, request: web.Request) -> web.Response:
        body = await _body(request, types.SampleRequest)
        if body.sampling_session_id is None or body.seq_id is None:
            raise RequestRefused("this service needs a sampling_session_id and a seq_id")
        sampler = self._registry.sampler(body.sampling_session_id)
        options = self._options
        seed = (options.seed, sampler.number, body.seq_id)
        job = wire.sampling_job(body, self._tokenizer.eos_token_id, options.context_length, options.vocabulary_size, seed)

        async def sample() -> Reply:
            return wire.sample_message(await self._worker.sample(sampler.model, job))

        request_id = f"{body.sampling_session_id}:{body.seq_id}"
        return self._accepted(request_id, sample, sample_sequence_ids=[f"{request_id}:{n}" for n in range(job.num_samples)])

    async def _retrieve_future(self, request: web.Request) -> web.Response:
        body = await _body(request, types.FutureRetrieveRequest)
        return wire.response(await self._promises.retrieve(body.request_id, self._long_poll_s))

    def _accepted(self, request_id: str, perform: Callable[[], Awaitable[Reply]], **more: Any) -> web.Response:
        self._promises.submit(request_id, perform)
        return wire.response(types.UntypedAPIFuture(request_id=request_id, **more))

    def _in_turn(self, model_id: str, seq_id: int | None, perform: Callable[[], Awaitable[Reply]]) -> web.Response:
        """Accept a request that changes or reads a model in training: it runs after those with lower numbers."""
        if not seq_id:
            raise RequestRefused("a training request needs a seq_id of 1 or more")
        turns = self._registry.model(model_id).turns

        async def perform_in_turn() -> Reply:
            async with turns.turn(seq_id):
                return await perform()

        return self._accepted(f"{model_id}:{seq_id}", perform_in_turn, model_id=model_id)

    def _check_base_model(self, name: str | None) -> None:
        if name != self.model_name:
            raise NotFound(f"there is no base model {name!r} here, only {self.model_name!r}")


async def _body(request: web.Request, kind: type[Body]) -> Body:
    return kind.model_validate_json(await request.read())


@web.middleware
async def _refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses those without a key, and turns what a handler raises into a status and a reason."""
    if request.path != "/api/v1/healthz" and not request.headers.get("X-API-Key", "").startswith("tml-"):
        return web.json_response({"detail": "send a key that begins with tml- in X-API-Key"}, status=401)
    try:
        return await handler(request)
    except RequestRefused as error:
        return web.json_response({"detail": str(error)}, status=error.status)
    except (pydantic.ValidationError, DecodeError) as error:
        return web.json_response({"detail": str(error)}, status=422)
