"""Answer five questions without any tool: shows that the model's endpoint and the trainer's wiring work. Needs no sandbox.

python -m hermes_envs.simple_qa process --env.policy oracle
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from backends.options import Names
from hermes_envs.env import AgentEnvConfig, AgentTask, OrderedEnv
from hermes_envs.errors import ConfigError
from hermes_envs.tasks.task_order import TaskOrder

SYSTEM_PROMPT = "Answer in one short sentence."


@dataclass(frozen=True)
class Question:
    """A question, and what a right answer contains."""

    text: str
    answer: str


QUESTIONS = (
    Question("What is the capital of France?", "Paris"),
    Question("Which planet is called the red planet?", "Mars"),
    Question("How many legs does a spider have? Answer with digits.", "8"),
    Question("What is the chemical formula of water?", "H2O"),
    Question("Which language are Django and Flask written in?", "Python"),
)


class SimpleQaConfig(AgentEnvConfig):
    """Options of the `simple_qa` environment."""

    total_steps: int = Field(len(QUESTIONS), description="Groups that `process` collects.")
    enabled_toolsets: Names = Field([], description="None: there is no sandbox to run tools in.")


class SimpleQaEnv(OrderedEnv):
    """Five questions; rewarded if the final response contains the answer, in whatever case."""

    name = "simple_qa"
    env_config_cls: ClassVar[type[AgentEnvConfig]] = SimpleQaConfig
    needs_sandbox = False
    config: SimpleQaConfig

    async def setup_agent_env(self) -> None:
        """Begin with the first question.

        Raises:
            ConfigError: tools are enabled.
        """
        if self.executor.tools:
            raise ConfigError("enabled_toolsets: simple_qa has no sandbox to run tools in; leave it empty")
        self.order = TaskOrder(QUESTIONS, seed=None)

    def item_name(self, item: Question) -> str:
        """Its number."""
        return f"question-{QUESTIONS.index(item) + 1}"

    async def build_task(self, item: Question) -> AgentTask:
        """The question, and a sentence as reference."""
        prompt = [
            {"role": "system", "content": self.config.system_prompt or SYSTEM_PROMPT},
            {"role": "user", "content": item.text},
        ]
        return AgentTask(prompt=prompt, reference=[f"It is {item.answer}."])

    async def score_trajectory(self, item: Question, final_response: str) -> float:
        """1 if the response contains the answer."""
        return float(item.answer.casefold() in final_response.casefold())

    def held_out_items(self) -> Sequence[Question]:
        """All questions: they are too few to hold any out."""
        return QUESTIONS


if __name__ == "__main__":
    SimpleQaEnv.cli()
