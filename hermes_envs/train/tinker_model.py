"""The model that is trained and sampled from, behind the `tinker` SDK: the one place that knows it."""

from __future__ import annotations

import asyncio
import importlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from hermes_envs.errors import ConfigError, EngineError, TrainingError
from hermes_envs.train.batch import TrainingSequence
from hermes_envs.train.options import TinkerService, TrainingConfig

_PROBE_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class RefusedSampleError(EngineError):
    """The service cannot do what is asked, such as to continue a prompt that is too long."""


@dataclass(frozen=True)
class SamplingRequest:
    """What to continue and how. `stop` is None for the model's own end, else token ids or texts."""

    prompt_ids: list[int]
    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: list[int] | list[str] | None = None


@dataclass(frozen=True)
class Completion:
    """One completion; the stop token that ended it is its last token."""

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool


@dataclass(frozen=True)
class StepOutcome:
    """What an optimiser step reports.

    `loss` is a sum over tokens, None if the service does not say. `logprob_difference` is the mean over trained tokens of how
    far trainer and sampler are apart; rollouts that began under earlier weights add to it.
    """

    loss: float | None
    logprob_difference: float


class TinkerModel:
    """An adapter that is trained, and the weights from which is sampled."""

    def __init__(self, sdk: Any, service: Any, training: Any, patience_s: float) -> None:
        self._sdk = sdk
        self._service = service
        self._training = training
        self._patience_s = patience_s
        self._sampling: Any = None

    async def sample(self, request: SamplingRequest) -> list[Completion]:
        """Sample `request.n` completions from the weights published last.

        Raises:
            RefusedSampleError: the service refuses the request.
            EngineError: it failed, or did not answer in time.
        """
        types = self._sdk.types
        parameters = types.SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop=request.stop,
        )
        prompt = types.ModelInput.from_ints(request.prompt_ids)
        refusals = (self._sdk.BadRequestError, self._sdk.UnprocessableEntityError)
        with _blaming(self._sdk, EngineError, "sampling", refusals):
            reply = await self._within(self._sampling.sample(prompt, num_samples=request.n, sampling_params=parameters))
        return [_completion(sequence) for sequence in reply.sequences]

    async def train(self, sequences: Sequence[TrainingSequence], learning_rate: float) -> StepOutcome:
        """One optimiser step on the importance-sampling loss of all sequences.

        Raises:
            TrainingError: the service failed; whether the step was taken is not known.
        """
        types = self._sdk.types
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(sequence.inputs),
                loss_fn_inputs={
                    "target_tokens": sequence.targets,
                    "logprobs": sequence.logprobs,
                    "advantages": sequence.advantages,
                },
            )
            for sequence in sequences
        ]
        adam = types.AdamParams(learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
        with _blaming(self._sdk, TrainingError, "the training step"):
            # The optimiser goes only after the gradients are known to be there: it would run without them, too.
            result = await self._within(self._training.forward_backward(data, "importance_sampling"))
            difference = _logprob_difference(sequences, result.loss_fn_outputs)
            await self._within(self._training.optim_step(adam))
        return StepOutcome(result.metrics.get("loss:sum"), difference)

    async def publish(self) -> None:
        """From now on sample from the weights as they are; requests under way end with those that they began with.

        Raises:
            TrainingError: the service failed.
        """
        with _blaming(self._sdk, TrainingError, "publishing weights"):
            self._sampling = await self._within(self._training.save_weights_and_get_sampling_client())

    async def save(self, name: str) -> tuple[str, str]:
        """Save weights under a name: the paths of all that training goes on from, and of what can be sampled from.

        Raises:
            TrainingError: the service failed.
        """
        with _blaming(self._sdk, TrainingError, "saving a checkpoint"):
            state = await self._within(self._training.save_state(name))
            sampler = await self._within(self._training.save_weights_for_sampler(name))
        return str(state.path), str(sampler.path)

    async def _within(self, request: Awaitable[Result]) -> Result:
        async with asyncio.timeout(self._patience_s):
            return await request


@asynccontextmanager
async def tinker_model(config: TrainingConfig, service: TinkerService, state_path: str | None) -> AsyncIterator[TinkerModel]:
    """A model for the length of a block: fresh, or as it was saved at `state_path`. Its first weights are published.

    Raises:
        ConfigError: the SDK is not installed.
        TrainingError: the service does not answer, refuses the key, or does not have the model.
    """
    sdk = _import_sdk()
    if service.base_url:
        await _probe(service.base_url)
    client = sdk.ServiceClient(
        base_url=service.base_url, api_key=service.api_key.get_secret_value() if service.api_key else None
    )
    outcome, is_open = "errored", False
    try:
        address = service.base_url or "its default address"
        what = f"loading {state_path or config.base_model} from the service at {address} (TINKER_BASE_URL)"
        with _blaming(sdk, TrainingError, what):
            async with asyncio.timeout(config.tinker.patience_s):
                # The first request of a client opens its session, and blocks.
                request = await _apart(lambda: _request_model(client, config, state_path))
                is_open = True
                training = await request
        model = TinkerModel(sdk, client, training, config.tinker.patience_s)
        await model.publish()
        yield model
        outcome = "success"
    finally:
        # Until a session is open, the SDK holds a lock for which closing would wait, and the event loop with it.
        if is_open:
            with suppress(sdk.TinkerError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await client.close(outcome)


async def _apart(call: Callable[[], Result]) -> Result:
    """Make a blocking call in a thread that nobody has to wait for: neither whoever gives up, nor the program at its end."""
    future: Future[Result] = Future()
    # One that runs is not cancelled together with the coroutine that awaits it.
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result = call()
        except Exception as reason:  # noqa: BLE001 - it is raised where the call is awaited.
            future.set_exception(reason)
        else:
            future.set_result(result)

    threading.Thread(target=work, name="tinker", daemon=True).start()
    return await asyncio.wrap_future(future)


def _request_model(client: Any, config: TrainingConfig, state_path: str | None) -> Any:
    if state_path is not None:
        return client.create_training_client_from_state_with_optimizer(state_path)
    return client.create_lora_training_client(config.base_model, rank=config.tinker.lora_rank, seed=config.tinker.seed)


def _import_sdk() -> Any:
    try:
        return importlib.import_module("tinker")
    except ImportError as reason:
        raise ConfigError(f"tinker: the SDK is not installed ({reason}); pip install 'hermes-envs[tinker]'") from reason


async def _probe(base_url: str) -> None:
    """Ask whether there is a service at all: the SDK would try for minutes, in a thread that cannot be ended."""
    address = f"{base_url.rstrip('/')}/api/v1/healthz"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)) as session,
            session.get(address) as reply,
        ):
            await reply.read()
    except (aiohttp.ClientError, TimeoutError, ValueError) as reason:
        problem = str(reason) or type(reason).__name__
        raise TrainingError(f"TINKER_BASE_URL: no Tinker service answers at {base_url}: {problem}") from reason


@contextmanager
def _blaming(
    sdk: Any, kind: type[EngineError | TrainingError], what: str, refusals: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Say what failed, in one type of error. A ValueError is how the SDK tells that a service has forgotten a request."""
    try:
        yield
    except TimeoutError as reason:
        raise kind(f"{what}: the Tinker service did not answer in time") from reason
    except refusals as reason:
        raise RefusedSampleError(f"{what}: {reason}") from reason
    except (sdk.TinkerError, ValueError) as reason:
        raise kind(f"{what}: {type(reason).__name__}: {reason}") from reason


def _completion(sequence: Any) -> Completion:
    tokens, logprobs = list(sequence.tokens), list(sequence.logprobs or ())
    if len(tokens) != len(logprobs):
        raise EngineError(f"sampling: the Tinker service returned {len(tokens)} tokens and {len(logprobs)} logprobs")
    return Completion(tokens, logprobs, truncated=sequence.stop_reason == "length")


def _logprob_difference(sequences: Sequence[TrainingSequence], outputs: Sequence[Any]) -> float:
    trained = [output["logprobs"].tolist() for output in outputs if "logprobs" in output]
    if [len(logprobs) for logprobs in trained] != [len(sequence.targets) for sequence in sequences]:
        raise TrainingError("the training step: the Tinker service did not return a logprob of each token of each sequence")
    differences: list[float] = [
        abs(logprobs[at] - sequence.logprobs[at])
        for sequence, logprobs in zip(sequences, trained, strict=True)
        for at in sequence.trained
    ]
    return sum(differences) / len(differences)
