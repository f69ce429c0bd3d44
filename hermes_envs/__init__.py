"""Reinforcement-learning environments for language models that act in sandboxes.

What somebody needs who writes an environment can be imported from here. It is loaded when it is asked for: `AgentEnv` takes
seconds, for atroposlib imports torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.base import Layer as Layer
    from backends.base import Slot as Slot
    from backends.errors import SandboxError as SandboxError
    from backends.options import Names as Names
    from hermes_envs.env import AgentEnv as AgentEnv
    from hermes_envs.env import OrderedEnv as OrderedEnv
    from hermes_envs.env_config import AgentEnvConfig as AgentEnvConfig
    from hermes_envs.errors import ConfigError as ConfigError
    from hermes_envs.errors import DatasetError as DatasetError
    from hermes_envs.errors import EngineError as EngineError
    from hermes_envs.errors import EnvironmentBuildError as EnvironmentBuildError
    from hermes_envs.errors import EnvironmentDefectError as EnvironmentDefectError
    from hermes_envs.errors import HermesEnvsError as HermesEnvsError
    from hermes_envs.errors import NothingCollectedError as NothingCollectedError
    from hermes_envs.errors import NotScoredError as NotScoredError
    from hermes_envs.errors import PhaseTimeoutError as PhaseTimeoutError
    from hermes_envs.errors import ToolServerError as ToolServerError
    from hermes_envs.rollouts.trajectory import Episode as Episode
    from hermes_envs.rollouts.trajectory import Score as Score
    from hermes_envs.rollouts.trajectory import Trajectory as Trajectory
    from hermes_envs.tasks.agent_task import AgentTask as AgentTask
    from hermes_envs.tasks.agent_task import TaskLimits as TaskLimits
    from hermes_envs.tasks.task_order import TaskOrder as TaskOrder
    from hermes_envs.tasks.task_set import TaskSet as TaskSet
    from hermes_envs.tools.call import ToolCall as ToolCall
    from hermes_envs.tools.external import ExternalTool as ExternalTool
    from hermes_envs.tools.tool import Tool as Tool
    from hermes_envs.tools.toolsets import Toolsets as Toolsets
    from hermes_envs.workspace import Workspace as Workspace

_NAMES = {
    "backends.base": ("Layer", "Slot"),
    "backends.errors": ("SandboxError",),
    "backends.options": ("Names",),
    "hermes_envs.env": ("AgentEnv", "OrderedEnv"),
    "hermes_envs.env_config": ("AgentEnvConfig",),
    "hermes_envs.errors": (
        "ConfigError",
        "DatasetError",
        "EngineError",
        "EnvironmentBuildError",
        "EnvironmentDefectError",
        "HermesEnvsError",
        "NotScoredError",
        "NothingCollectedError",
        "PhaseTimeoutError",
        "ToolServerError",
    ),
    "hermes_envs.rollouts.trajectory": ("Episode", "Score", "Trajectory"),
    "hermes_envs.tasks.agent_task": ("AgentTask", "TaskLimits"),
    "hermes_envs.tasks.task_order": ("TaskOrder",),
    "hermes_envs.tasks.task_set": ("TaskSet",),
    "hermes_envs.tools.call": ("ToolCall",),
    "hermes_envs.tools.external": ("ExternalTool",),
    "hermes_envs.tools.tool": ("Tool",),
    "hermes_envs.tools.toolsets": ("Toolsets",),
    "hermes_envs.workspace": ("Workspace",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
