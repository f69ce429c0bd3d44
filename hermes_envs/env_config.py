"""Every option that all environments have."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from atroposlib.envs.base import BaseEnvConfig
from pydantic import ConfigDict, Field

from backends import BackendOptions
from backends.options import Names
from hermes_envs.policies import PolicyOptions
from hermes_envs.rollouts.agent import AgentOptions
from hermes_envs.runs.evaluation import EvaluationOptions
from hermes_envs.runs.group_queue import QueueOptions
from hermes_envs.tools.executor import ToolOptions
from hermes_envs.tools.tool_server_client import ToolServerOptions


class AgentEnvConfig(
    BaseEnvConfig,  # type: ignore[misc]
    BackendOptions,
    AgentOptions,
    ToolOptions,
    ToolServerOptions,
    PolicyOptions,
    QueueOptions,
    EvaluationOptions,
):
    """Every option of an environment; each is an `--env.*` flag and a key below `env:` in YAML."""

    model_config = ConfigDict(extra="forbid")

    enabled_toolsets: Names = Field(["default"], description="Toolsets that the model is offered.")
    disabled_toolsets: Names = Field([], description="Toolsets whose tools are taken away again.")
    system_prompt: str = Field("", description="System message; empty for the environment's own.")
    worker_timeout: float = Field(
        -1.0, description="Longest that `serve` waits for a group, in seconds; -1: each phase of a rollout has its own limit."
    )
    rollout_attempts: int = Field(3, ge=1, description="Times that a rollout is tried when infrastructure fails.")
    rollout_timeout_s: float = Field(
        7200.0,
        gt=0,
        description="Longest that set-up and agent may take, from when there is a slot: an agent that is still at work then "
        "ends with `timeout`. Grading may take as long again.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="What is logged to standard error; `debug` has what slot servers say, too."
    )
    cache_directory: str = Field("~/.cache/hermes-envs", description="Where fetched repositories and tasks are kept.")

    @property
    def cache_path(self) -> Path:
        """`cache_directory` with the home directory in it."""
        return Path(self.cache_directory).expanduser()
