r"""Solve grade-school maths with a Python tool; the answer stands in \boxed{}.

python -m hermes_envs.gsm8k_agent process --config configs/gsm8k_agent.yaml --env.policy oracle
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

from pydantic import Field

from backends.options import Names
from hermes_envs.env import AgentEnvConfig, AgentTask, OrderedEnv
from hermes_envs.errors import ConfigError, DatasetError
from hermes_envs.maths.answer_checker import AnswerChecker
from hermes_envs.maths.problem import BUNDLED, Problem, split_problems
from hermes_envs.policies.base import Reference
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.tasks.task_order import TaskOrder
from hermes_envs.tasks.task_set import TaskSet
from hermes_envs.tools.call import ToolCall
from hermes_envs.workspace import Workspace, explain

SYSTEM_PROMPT = r"""You solve maths problems. Use the tool `python` for calculations: it runs a script and returns what that
prints. When you know the answer, end with a message that calls no tool and has the answer in \boxed{}: one number, without a
unit.
"""


class Gsm8kAgentConfig(AgentEnvConfig):
    """Options of the `gsm8k_agent` environment."""

    dataset_name: str = Field(
        "bundled",
        description="`bundled`, a folder with tasks.jsonl, a .jsonl or .parquet file, or a dataset of the Hugging Face hub, "
        "such as openai/gsm8k; with columns `question` and `answer`.",
    )
    dataset_subset: str = Field("main", description="Configuration of a hub dataset.")
    dataset_split: str = Field("train", description="Split of a hub dataset.")
    eval_split_ratio: float = Field(0.2, ge=0, lt=1, description="Share of the problems that is held out for `evaluate`.")
    eval_split_seed: int = Field(0, description="Seed that decides which.")
    max_items: int = Field(0, ge=0, description="Use only so many of the other problems; 0 for all.")
    shuffle: bool = Field(True, description="Take them in random order.")
    seed: int = Field(0, description="Seed of that order.")
    enabled_toolsets: Names = Field(["python"], description="Toolsets that the model is offered.")
    agent_max_steps: int = Field(8, ge=1, description="Most turns of the model in one trajectory.")


class Gsm8kAgentEnv(OrderedEnv):
    """Grade-school maths with a Python tool; rewarded by the number in the last box of the final response."""

    name = "gsm8k_agent"
    env_config_cls: ClassVar[type[AgentEnvConfig]] = Gsm8kAgentConfig
    config: Gsm8kAgentConfig

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """As `AgentEnv.running`, with what compares answers."""
        async with AnswerChecker() as self._answers, super().running():
            yield

    async def setup_agent_env(self) -> None:
        """Read the problems and hold some of them out.

        Raises:
            DatasetError: there is no usable row.
            ConfigError: slots have no Python.
        """
        problems = await self._read_problems()
        training, self._held_out = split_problems(problems, self.config.eval_split_ratio, self.config.eval_split_seed)
        seed = self.config.seed if self.config.shuffle else None
        self.order = TaskOrder(training, seed=seed, most=self.config.max_items)
        if "python" in self.executor.tools:
            await self._require_python()

    async def _read_problems(self) -> list[Problem]:
        named = self.config.dataset_name
        task_set = await TaskSet.load(
            str(BUNDLED) if named == "bundled" else named,
            self.config.dataset_split,
            self.config.cache_path,
            subset=self.config.dataset_subset,
        )
        source = named.rstrip("/").rpartition("/")[2]
        problems = []
        for number, row in enumerate(task_set.rows, start=1):
            try:
                problems.append(Problem.from_row(f"{source}-{number}", row))
            except DatasetError as reason:
                self.summary.skipped_rows.append(str(reason))
        if not problems:
            why = f": {self.summary.skipped_rows[0]}" if self.summary.skipped_rows else ""
            raise DatasetError(f"dataset_name: {named!r} has no usable row{why}")
        return problems

    async def _require_python(self) -> None:
        """A model that is offered a tool which cannot work would learn not to use it."""
        async with self.backend.slot("look-for-python") as slot:
            result = await self.executor.run(Workspace(self.backend, slot), _python("look", "print(6 * 7)"))
        if result.output.strip() != "42":
            raise ConfigError(f"enabled_toolsets: the tool python does not work in the sandbox: {explain(result)}")

    def item_name(self, item: Problem) -> str:
        """The row it is from."""
        return item.name

    async def build_task(self, item: Problem) -> AgentTask:
        """The question; the answer is in the reference solution alone."""
        prompt = [
            {"role": "system", "content": self.config.system_prompt or SYSTEM_PROMPT},
            {"role": "user", "content": item.question},
        ]
        return AgentTask(prompt=prompt, reference=_reference(item))

    async def verify_and_score_trajectory(self, task: AgentTask, episode: Episode, workspace: Workspace) -> Score:
        r"""1 if the last `\boxed{}` of the final response is equal to the answer, else 0."""
        if episode.end in ("max_steps", "context", "timeout"):
            return Score(0.0, "there is no final response")
        fault = await self._answers.find_fault(episode.final_response, task.item.answer)
        return Score(0.0, fault) if fault else Score(1.0, "the answer is right")

    def held_out_items(self) -> Sequence[Problem]:
        """The problems that training never sees.

        Raises:
            ConfigError: there is none.
        """
        if not self._held_out:
            raise ConfigError("eval_split_ratio: no problem is held out; it must be above 0")
        return self._held_out


def _python(call_id: str, code: str) -> ToolCall:
    return ToolCall(call_id, "python", {"code": code})


def _reference(item: Problem) -> Reference:
    answer = f"The answer is \\boxed{{{item.answer}}}."
    if item.solution is None:
        return [answer]
    return [_python("solution", f"import math\nfrom fractions import Fraction\n\nprint({item.solution})"), answer]


if __name__ == "__main__":
    Gsm8kAgentEnv.cli()
