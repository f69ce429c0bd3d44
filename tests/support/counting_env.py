"""An environment whose items are the numbers 0, 1, 2, ...: cheap to roll out, and each group tells where it is from.

python -m tests.support.counting_env serve --env.rollout_server_url URL --openai.base_url URL ...
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, ClassVar

from pydantic import Field

from backends.errors import SandboxError
from hermes_envs.env import AgentEnv, AgentEnvConfig, AgentTask
from hermes_envs.policies.token_record import UNTRAINED_MASK
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.workspace import Workspace

SCORES = 7


def score_of(masks: list[int]) -> float:
    """The score that a sequence of these masks must have: what of it was sampled decides."""
    return float(sum(mask for mask in masks if mask != UNTRAINED_MASK) % SCORES)


class CountingConfig(AgentEnvConfig):
    """Options of the counting environment."""

    items: int = Field(-1, description="How many items there are; -1: no end.")
    item_seconds: float = Field(0.0, ge=0, description="How long it takes to get an item, but for the first.")
    failing_setups: float = Field(0.0, ge=0, le=1, description="Share of the rollouts' setups that fail.")
    grading_seconds: float = Field(0.0, ge=0, description="How long scoring takes.")
    slow_item: int = Field(-1, description="An item whose scoring takes a minute.")
    evaluation_seconds: float = Field(0.0, ge=0, description="How long an evaluation takes.")
    evaluation_fails: bool = Field(False, description="Whether an evaluation ends with an error.")
    broken_item: int = Field(-1, description="An item that none can be prepared for.")


class CountingEnv(AgentEnv):
    """Count."""

    name = "counting"
    env_config_cls: ClassVar[type[AgentEnvConfig]] = CountingConfig
    config: CountingConfig

    async def setup_agent_env(self) -> None:
        """Begin at 0."""
        self.taken: list[int] = []
        self.evaluated_at: list[int] = []
        self.begun_in_evaluations = 0
        self._next = 0
        self._random = random.Random(11)

    async def get_next_item(self) -> int | None:
        """The next number."""
        if self._next == self.config.items:
            return None
        await asyncio.sleep(self.config.item_seconds if self._next else 0.0)
        self._next += 1
        self.taken.append(self._next - 1)
        return self._next - 1

    def data_position(self) -> int:
        """The next number."""
        return self._next

    def restore_data_position(self, position: int) -> None:
        """Go on with a number."""
        self._next = position

    async def build_task(self, item: int) -> AgentTask:
        """The number is the prompt."""
        return AgentTask(prompt=[{"role": "user", "content": f"Item {item}."}])

    async def setup_trajectory_workspace(self, task: AgentTask, workspace: Workspace) -> None:
        """Fail sometimes."""
        if task.item == self.config.broken_item or self._random.random() < self.config.failing_setups:
            raise SandboxError("the slot broke, as it was told to")

    async def verify_and_score_trajectory(self, task: AgentTask, episode: Episode, workspace: Workspace) -> Score:
        """By what was sampled."""
        await asyncio.sleep(60.0 if task.item == self.config.slow_item else self.config.grading_seconds)
        return Score(score_of([mask for segment in episode.record.segments for mask in segment.masks]), "sampled")

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Remember when."""
        self.evaluated_at.append(self.curr_step)
        taken = len(self.taken)
        await asyncio.sleep(self.config.evaluation_seconds)
        self.begun_in_evaluations += len(self.taken) - taken
        if self.config.evaluation_fails:
            raise ValueError("the evaluation failed, as it was told to")


if __name__ == "__main__":
    CountingEnv.cli()
