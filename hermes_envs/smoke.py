"""Run a command in the sandbox and repeat what it printed: shows that the model, the tools and the scoring work together.

python -m hermes_envs.smoke process --env.policy oracle --env.tool_server_url inprocess
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from backends.errors import SandboxError
from backends.options import Names
from hermes_envs.env import AgentEnv, AgentEnvConfig, AgentTask
from hermes_envs.errors import ConfigError
from hermes_envs.policies.base import Reference
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.tools.call import ToolCall
from hermes_envs.tools.sha256 import SHA256
from hermes_envs.workspace import Workspace

FILE = "token.txt"
COMMAND = f"cat {FILE}"

_SHELL_TOOLS = ("terminal", "bash", "terminal_stateful", "bash_stateful")


class SmokeConfig(AgentEnvConfig):
    """Options of the `smoke` environment."""

    total_steps: int = Field(1, description="Groups that `process` collects.")
    num_eval_tasks: int = Field(4, ge=1, description="Tokens that `evaluate` makes up.")
    enabled_toolsets: Names = Field(["terminal"], description="Toolsets that the model is offered.")


@dataclass(frozen=True)
class HiddenToken:
    """A token that nobody knows who has not looked into the sandbox."""

    name: str
    token: str

    @property
    def digest(self) -> str:
        """What the external tool makes of the token."""
        return hashlib.sha256(self.token.encode()).hexdigest()


class SmokeEnv(AgentEnv):
    """Print a fresh random token in the sandbox and repeat it; with a tool server, call a tool of it, too."""

    name = "smoke"
    env_config_cls: ClassVar[type[AgentEnvConfig]] = SmokeConfig
    own_external_tools = (SHA256,)
    config: SmokeConfig

    async def setup_agent_env(self) -> None:
        """Look whether the tools are there that a solution needs.

        Raises:
            ConfigError: one is not.
        """
        offered = [name for name in _SHELL_TOOLS if name in self.executor.tools]
        if not offered:
            raise ConfigError(f"enabled_toolsets: smoke needs one of the tools {', '.join(_SHELL_TOOLS)}")
        if self.config.tool_server_url and not self.executor.is_external(SHA256.name):
            raise ConfigError(f"tool_server_url: smoke calls the tool {SHA256.name!r}, which the server does not have")
        self._shell_tool = offered[0]
        self._numbers = itertools.count(1)

    async def get_next_item(self) -> HiddenToken:
        """A token that was not there before; there are always more."""
        return self._new_token()

    def _new_token(self) -> HiddenToken:
        return HiddenToken(f"smoke-{next(self._numbers)}", secrets.token_hex(16))

    def item_name(self, item: HiddenToken) -> str:
        """Its number, without the token."""
        return item.name

    async def build_task(self, item: HiddenToken) -> AgentTask:
        """What to do, without the token."""
        steps = [f"Run the command `{COMMAND}` with the tool {self._shell_tool}; it prints a token."]
        reference: list[ToolCall | str] = [ToolCall("command", self._shell_tool, {"command": COMMAND})]
        if self.config.tool_server_url:
            steps.append(f"Call the tool {SHA256.name} with the token as its text.")
            reference.append(ToolCall("digest", SHA256.name, {"text": item.token}))
        steps.append("Answer with the token alone, exactly as it was printed.")
        prompt = [{"role": "user", "content": "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))}]
        if self.config.system_prompt:
            prompt.insert(0, {"role": "system", "content": self.config.system_prompt})
        solution: Reference = [*reference, item.token]
        return AgentTask(prompt=prompt, reference=solution)

    async def setup_trajectory_workspace(self, task: AgentTask, workspace: Workspace) -> None:
        """Put the token where the command finds it."""
        written = await workspace.write(FILE, task.item.token.encode())
        if not written.success:
            raise SandboxError(f"the token cannot be written: {written.error}")

    async def verify_and_score_trajectory(self, task: AgentTask, episode: Episode, workspace: Workspace) -> Score:
        """1 if the tools answered what they had to and the final response is the token, else 0."""
        item: HiddenToken = task.item
        answers = [(message["name"], message["content"]) for message in episode.messages if message["role"] == "tool"]
        if (self._shell_tool, item.token) not in answers:
            return Score(0.0, "the command did not print the token")
        if self.config.tool_server_url and (SHA256.name, item.digest) not in answers:
            return Score(0.0, "the external tool was not called with the token")
        if episode.final_response.strip() != item.token:
            return Score(0.0, "the final response is not the token")
        return Score(1.0, "the token was repeated")

    def held_out_items(self) -> Sequence[HiddenToken]:
        """`num_eval_tasks` tokens that nobody has seen."""
        return [self._new_token() for _ in range(self.config.num_eval_tasks)]


if __name__ == "__main__":
    SmokeEnv.cli()
