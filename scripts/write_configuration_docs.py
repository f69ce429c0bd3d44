"""Writes docs/configuration.md from the options' own descriptions; `--check` fails when the file is not up to date."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from atroposlib.envs.base import BaseEnvConfig
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from backends import BackendOptions
from backends.options import PoolOptions
from hermes_envs.env import AgentEnvConfig
from hermes_envs.gsm8k_agent import Gsm8kAgentConfig
from hermes_envs.policies import PolicyOptions
from hermes_envs.rollouts.agent import AgentOptions
from hermes_envs.runs.evaluation import EvaluationOptions
from hermes_envs.runs.group_queue import QueueOptions
from hermes_envs.simple_qa import SimpleQaConfig
from hermes_envs.smoke import SmokeConfig
from hermes_envs.swe_smith import SweSmithConfig
from hermes_envs.tools.executor import ToolOptions
from hermes_envs.tools.tool_server_client import ToolServerOptions

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "Who answers": (PolicyOptions,),
    "The agent": (AgentOptions,),
    "Tools": (ToolOptions, ToolServerOptions),
    "Sandboxes": (PoolOptions, BackendOptions),
    "Evaluation": (EvaluationOptions,),
    "Runs": (QueueOptions, AgentEnvConfig),
    "`swe_smith`": (SweSmithConfig,),
    "`gsm8k_agent`": (Gsm8kAgentConfig,),
    "`simple_qa`": (SimpleQaConfig,),
    "`smoke`": (SmokeConfig,),
}
HEAD = """\
# Configuration

Every option is a flag, `--env.NAME VALUE`, and a key below `env:` in the YAML file that `--config` names; flags win over the
file, the file over the defaults. Lists are separated by commas on the command line. Unknown keys are errors. The endpoint is
configured by `--openai.base_url`, `--openai.model_name`, `--openai.server_type`, `--openai.api_key`, `--openai.timeout`,
`--openai.num_max_requests_at_once` and `--openai.health_check`, or below `openai:`, where a list names several. This page is
made from the code by `scripts/write_configuration_docs.py`.
"""


def page() -> str:
    """The whole page."""
    seen = set(BaseEnvConfig.model_fields)
    parts = [HEAD]
    for title, models in SECTIONS.items():
        fields = {name: field for model in models for name, field in model.model_fields.items() if name not in seen}
        if not fields:
            continue
        seen |= set(fields)
        parts.append(f"## {title}\n\n| option | default | |\n|---|---|---|\n" + "".join(map(row, fields, fields.values())))
    parts.append(
        "## From atroposlib\n\n| option | default | |\n|---|---|---|\n"
        + "".join(row(name, AgentEnvConfig.model_fields[name]) for name in BaseEnvConfig.model_fields)
    )
    return "\n".join(parts)


def row(name: str, field: FieldInfo) -> str:
    """One option as a row of a table."""
    description = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {shown(field.get_default(call_default_factory=True))} | {description}{choices(field)} |\n"


def shown(default: Any) -> str:
    """A default as YAML would have it."""
    if default is None:
        return "none"
    if isinstance(default, Enum):
        default = default.value
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, list):
        default = ", ".join(default)
    if isinstance(default, bool):
        default = str(default).lower()
    return "empty" if default == "" else f"`{default}`"


def choices(field: FieldInfo) -> str:
    """The values of an option that has only a few."""
    if get_origin(field.annotation) is not Literal:
        return ""
    return f" One of {', '.join(f'`{value}`' for value in get_args(field.annotation))}."


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != page() and "docs/configuration.md is not up to date: run this script")
    TARGET.write_text(page(), encoding="utf-8")
