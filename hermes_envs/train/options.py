"""What a training run is told: the `env:` and `tinker:` sections of the file that trainer and environment share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict

from hermes_envs.errors import ConfigError
from hermes_envs.runs.config_file import mapping, read_sections
from hermes_envs.services.variables import VariableOptions


class TinkerService(VariableOptions):
    """Where the Tinker service is and who asks."""

    model_config = SettingsConfigDict(env_prefix="TINKER_")

    base_url: str | None = Field(None, description="Its address; none for the SDK's own default.")
    api_key: SecretStr | None = Field(None, description="Its key; none for what the SDK has stored.")


class TrainerOptions(BaseModel):
    """Every option of the trainer; each is a key below `tinker:`."""

    model_config = ConfigDict(extra="forbid")

    base_model: str | None = Field(None, description="Model to train; none: env.tokenizer_name.")
    lora_rank: int = Field(32, ge=1, description="Rank of the adapter.")
    learning_rate: float = Field(4e-5, gt=0, description="Adam's learning rate.")
    seed: int | None = Field(None, description="Seed of the adapter's first weights.")
    max_token_trainer_length: int = Field(2048, ge=2, description="Longest sequence to train on; a longer one is dropped.")
    checkpoint_dir: str = Field("./temp/", description="Where a run has its folder with checkpoints and metrics.")
    save_checkpoint_interval: int = Field(0, ge=0, description="Steps between checkpoints; 0: one at the end alone.")
    wandb_project: str = Field("atropos-tinker", description="Project of metrics.")
    wandb_group: str | None = Field(None, description="Group of metrics; none: the run's name.")
    wandb_run_name: str = Field("atropos-tinker-run", description="The run's name, by which it is resumed.")
    wandb_run_suffix: str | None = Field(None, description="Appended to the run's name.")
    inference_host: str = Field("127.0.0.1", description="Address at which the environment gets its completions.")
    inference_port: int = Field(8001, ge=0, le=65535, description="Its port.")
    patience_s: float = Field(600.0, gt=0, description="How long run-api, and a request to the Tinker service, may take.")

    @property
    def run_name(self) -> str:
        """The name with its suffix."""
        return self.wandb_run_name + (f"-{self.wandb_run_suffix}" if self.wandb_run_suffix else "")

    @property
    def run_folder(self) -> Path:
        """The run's own folder."""
        return Path(self.checkpoint_dir).expanduser() / self.run_name


class EnvironmentOptions(BaseModel):
    """What the trainer reads of the `env:` section; the environment itself checks that section."""

    model_config = ConfigDict(extra="ignore")

    tokenizer_name: str = Field(description="Tokenizer of the model.")
    group_size: int = Field(ge=2, description="Trajectories of a group.")
    batch_size: int = Field(ge=2, description="Sequences of a batch.")
    total_steps: int = Field(ge=1, description="Batches to train on.")
    rollout_server_url: str = Field("http://localhost:8000", description="Address of run-api.")
    renderer: str = Field("auto", description="The model family's renderer, for /v1/chat/completions.")
    use_wandb: bool = Field(True, description="Whether metrics go to wandb.")
    agent_temperature: float = Field(0.7, description="Sampling temperature.")


class EndpointOptions(BaseModel):
    """What the trainer reads of an endpoint of the `openai:` section."""

    model_config = ConfigDict(extra="ignore")

    base_url: str = Field("", description="Where the environment gets its completions.")
    api_key: SecretStr | None = Field(None, description="What its requests carry.")


class TrainingConfig(BaseModel):
    """A run's configuration."""

    model_config = ConfigDict(extra="forbid")

    env: EnvironmentOptions
    openai: list[EndpointOptions] = []
    tinker: TrainerOptions

    @property
    def base_model(self) -> str:
        """The model that is trained."""
        return self.tinker.base_model or self.env.tokenizer_name

    def check_endpoints(self) -> None:
        """Check that every endpoint of the environment is this trainer's inference server.

        Raises:
            ConfigError: one is not.
        """
        host, port = self.tinker.inference_host, self.tinker.inference_port
        own = {("http", name, port) for name in ("localhost", "127.0.0.1", host.lower())}
        for endpoint in self.openai:
            if _address(endpoint.base_url) not in own:
                raise ConfigError(
                    f"openai.base_url: {endpoint.base_url!r} is not this trainer, which listens at {host}, port {port} "
                    "(tinker.inference_host and inference_port)"
                )

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Mapping[str, Any]]) -> Self:
        """Read a file with the sections `env:`, `openai:` and `tinker:`; `overrides` come on top, section by section.

        Raises:
            ConfigError: the file cannot be read, lacks a section, or has a key or a value that means nothing.
        """
        sections = read_sections(path)
        for name in ("env", "openai", "tinker"):
            if not sections.get(name):
                raise ConfigError(f"config: {path}: the section {name}: is missing")
        merged = {name: {**mapping(path, name, sections[name]), **overrides.get(name, {})} for name in ("env", "tinker")}
        endpoints = [sections["openai"]] if isinstance(sections["openai"], Mapping) else sections["openai"]
        try:
            config = cls.model_validate({**merged, "openai": endpoints})
        except ValidationError as reason:
            raise ConfigError(f"config: {path}: {_in_words(reason)}") from reason
        if config.env.batch_size % config.env.group_size:
            raise ConfigError(
                f"config: {path}: env.batch_size: {config.env.batch_size} is no multiple of env.group_size "
                f"{config.env.group_size}; run-api would never make a batch"
            )
        if _address(config.env.rollout_server_url) is None:
            raise ConfigError(
                f"config: {path}: env.rollout_server_url: {config.env.rollout_server_url!r} is no URL; one is like "
                "http://localhost:8000"
            )
        return config


def _address(url: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port of an HTTP URL; None if it is none."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        return None
    return (scheme, host, port) if scheme in ("http", "https") and host else None


def _in_words(reason: ValidationError) -> str:
    error = reason.errors()[0]
    problem = "there is no such option" if error["type"] == "extra_forbidden" else error["msg"]
    return f"{'.'.join(map(str, error['loc']))}: {problem}"
