"""A training run as a whole: everything that it needs is started, and ended with it."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import AutoTokenizer

from hermes_envs.environments import ENVIRONMENTS
from hermes_envs.errors import ConfigError, TrainingError
from hermes_envs.rendering.choice import create_chat_renderer
from hermes_envs.services.http_service import stop_signal
from hermes_envs.services.options import ServiceOptions
from hermes_envs.train.batch_source import BatchSource
from hermes_envs.train.checkpoint import Checkpoint
from hermes_envs.train.companions import Companions, check_free_port, start_run_api
from hermes_envs.train.inference import InferenceServer
from hermes_envs.train.metrics import Metrics
from hermes_envs.train.options import TinkerService, TrainingConfig
from hermes_envs.train.tinker_model import tinker_model
from hermes_envs.train.trainer import Trainer, resume_from

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment"
LAST_EVALUATION_S = 3600.0
"""How long the environment may go on after the last step."""


@dataclass(frozen=True)
class EnvironmentCommand:
    """The environment that is to be started: a module, and its arguments."""

    module: str
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, name: str, config_path: Path, arguments: tuple[str, ...]) -> EnvironmentCommand:
        """The command of an environment that `ENVIRONMENTS` knows by name, or of a module with a dot in its name.

        Raises:
            ConfigError: there is no such environment or module.
        """
        is_module = "." in name and ":" not in name
        module = name if is_module else ENVIRONMENTS.find(name).module
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ConfigError(f"--environment: there is no module {module}")
        # A file may name another policy, for `process`; a trainer can use the tokens of this one alone.
        serve = ("serve", "--config", str(config_path), "--env.policy", "tokens", *arguments)
        return cls(name, serve) if is_module else cls("hermes_envs.environments", (name, *serve))


async def run(config: TrainingConfig, service: TinkerService, environment: EnvironmentCommand | None) -> bool:
    """Train to the end, or until SIGTERM or SIGINT; whether the end was reached.

    With an `environment` this starts `run-api` and it, too.

    Raises:
        ConfigError: something cannot work as configured.
        TrainingError: a service failed, or one of the processes ended.
    """
    if config.env.agent_temperature != 1.0:
        logger.warning(
            "env.agent_temperature: at %g tokens are sampled from another distribution than the one that is trained; use 1.0",
            config.env.agent_temperature,
        )
    checkpoint = resume_from(config)
    async with Companions(config.tinker.run_folder) as companions:
        training = asyncio.create_task(_train(config, service, checkpoint, companions, environment))
        stopped = asyncio.create_task(stop_signal().wait())
        try:
            awaited: set[asyncio.Future[Any]] = {training, stopped, companions.failure}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            training.cancel()
            await asyncio.wait({training})
        error = None if training.cancelled() else training.exception()
        if companions.failure.done():
            raise TrainingError(companions.failure.result()) from error
        if error is not None:
            raise error
        return not training.cancelled()


async def _train(
    config: TrainingConfig,
    service: TinkerService,
    checkpoint: Checkpoint | None,
    companions: Companions,
    environment: EnvironmentCommand | None,
) -> None:
    options = _inference_options(config)
    check_free_port("tinker.inference_port", options.host, options.port)
    async with AsyncExitStack() as stack:
        if environment is not None:
            await start_run_api(companions, config.env.rollout_server_url)
        tokenizer = await asyncio.to_thread(_load_tokenizer, config.env.tokenizer_name)
        renderer = functools.cache(lambda: create_chat_renderer(tokenizer, config.env.renderer))
        server = InferenceServer(config.base_model, tokenizer, renderer, options)
        await stack.enter_async_context(server.service.listening())
        first_step = checkpoint.step if checkpoint else 0
        if checkpoint is not None:
            logger.info("resuming at step %d from %s", first_step, checkpoint.state_path)
        server.published(first_step)
        source = await stack.enter_async_context(
            BatchSource(config, first_step=first_step, is_dry=lambda: ENVIRONMENT in companions.finished)
        )
        await source.register()
        # An environment waits for a registered trainer's first request for a batch.
        if environment is not None:
            await companions.start(ENVIRONMENT, environment.module, environment.arguments, may_finish=True)
        model = await stack.enter_async_context(tinker_model(config, service, checkpoint.state_path if checkpoint else None))
        server.use(model)
        metrics = await stack.enter_async_context(Metrics(config, first_step))
        # Before what they use is gone.
        stack.push_async_callback(companions.stop)
        await Trainer(config, source, model, metrics, len(tokenizer), server.published).run()
        if environment is not None:
            await _await_last_evaluation(companions)


async def _await_last_evaluation(companions: Companions) -> None:
    """The environment ends by itself after the last step, and after an evaluation that is due then, which needs the model."""
    logger.info("all steps are done; waiting for the environment to end")
    try:
        async with asyncio.timeout(LAST_EVALUATION_S):
            await companions.ended(ENVIRONMENT)
    except TimeoutError:
        logger.warning("the environment has not ended within %g s of the last step; ending it", LAST_EVALUATION_S)


def _inference_options(config: TrainingConfig) -> ServiceOptions:
    """Where to listen; others than this machine's processes have to know the key of the `openai:` section."""
    host, port = config.tinker.inference_host, config.tinker.inference_port
    key = next((endpoint.api_key for endpoint in config.openai if endpoint.api_key), None)
    try:
        return ServiceOptions(host=host, port=port, token=None if host in ("127.0.0.1", "localhost") else key)
    except ValidationError as reason:
        raise ConfigError(f"tinker.inference_host: {host!r} can be reached by others; give openai.api_key") from reason


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as reason:
        raise ConfigError(f"env.tokenizer_name: cannot load {name!r}: {reason}") from reason
