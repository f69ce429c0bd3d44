"""Measures a policy on held-out items: several rollouts of each, pass@k, and a record of every item."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import wandb
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from hermes_envs.rollouts.group import Blame, Group
from hermes_envs.runs.collection import CollectedEnvironment, collect
from hermes_envs.runs.summary import Summary


class EvaluatedEnvironment(CollectedEnvironment, Protocol):
    """What an evaluation asks of an environment beside that."""

    name: str | None
    curr_step: int
    """The trainer's step, 0 without a trainer."""
    wandb_prepend: str | None

    @property
    def models(self) -> list[str]:
        """The names of the models that are asked."""

    @property
    def config(self) -> Any:
        """All of its options."""


class EvaluationOptions(BaseModel):
    """How much an evaluation measures. Where its records go is atroposlib's `data_dir_to_save_evals`."""

    model_config = ConfigDict(extra="forbid")

    eval_group_size: int = Field(0, ge=0, description="Rollouts of each item that is evaluated; 0 for group_size.")
    num_eval_tasks: int = Field(0, ge=0, description="Most items that are evaluated; 0 for all that are held out.")


def pass_at_k(rollouts: int, solved: int, k: int) -> float:
    """The chance that at least one of `k` rollouts solves an item, when `solved` of `rollouts` did.

    The unbiased estimator of Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1.
    `k` is at most `rollouts`.
    """
    return 1.0 - math.comb(rollouts - solved, k) / math.comb(rollouts, k)


@dataclass
class Evaluation(Summary):
    """What an evaluation found. Rollouts that infrastructure ended count nowhere but as infrastructure errors."""

    rollouts_per_item: int = 1
    outcomes: list[tuple[int, int]] = field(default_factory=list)
    """How many rollouts of each item were scored, and how many of those reached a score of 1."""

    def add(self, group: Group) -> None:
        """Count an item's rollouts."""
        super().add(group)
        self.outcomes.append((len(group.scores), sum(score >= 1.0 for score in group.scores)))

    def pass_at(self) -> dict[int, tuple[float, int]]:
        """For k = 1, 2, 4 and so on, and for all rollouts: the mean pass@k, and over how many items.

        An item counts for each k for which it has as many scored rollouts.
        """
        ks = sorted({2**power for power in range(self.rollouts_per_item.bit_length())} | {self.rollouts_per_item})
        estimates = {k: [pass_at_k(rollouts, solved, k) for rollouts, solved in self.outcomes if rollouts >= k] for k in ks}
        return {k: (sum(values) / len(values), len(values)) for k, values in estimates.items() if values}

    def metrics(self) -> dict[str, float]:
        """The figures by the names that wandb gets."""
        return {
            "eval/mean_score": self.mean_score,
            **{f"eval/pass@{k}": value for k, (value, _) in self.pass_at().items()},
            "eval/items": self.groups,
            "eval/rollouts": self.trajectories,
            "eval/infrastructure_errors": self.infrastructure_errors,
        }

    def table(self, title: str) -> Table:
        """The account, and a line for each k."""
        table = super().table(title)
        for k, (value, items) in self.pass_at().items():
            if k > 1:
                table.add_row(f"pass@{k}", f"{value:.3f}" + (f" (of {items} items)" if items < self.groups else ""))
        return table


async def evaluate(env: EvaluatedEnvironment, items: Sequence[Any], options: EvaluationOptions) -> Evaluation:
    """Roll items out beside whatever else the environment does, print the account and keep a record.

    The environment must be `running`. What a trainer gets is not touched: neither the environment's own account nor its place
    in its items.

    Raises:
        NothingCollectedError: no rollout was scored.
    """
    size = options.eval_group_size or env.config.group_size
    evaluation = Evaluation(rollouts_per_item=size)
    record = _Record(env)
    pending = iter(items)

    async def next_item() -> Any:
        return next(pending, None)

    async def save(item: Any, group: Group) -> None:
        await record.add_item(group)

    await collect(
        env,
        next_item,
        groups=len(items),
        expected=len(items),
        size=size,
        summary=evaluation,
        title=f"{env.name} evaluation",
        save=save,
    )
    await record.conclude(evaluation)
    _log(env, evaluation)
    return evaluation


def _log(env: EvaluatedEnvironment, evaluation: Evaluation) -> None:
    """Beside `wandb_log`, which would report and forget what training has gathered since its last report."""
    if env.config.use_wandb and wandb.run is not None:
        prefix = f"{env.wandb_prepend}_" if env.wandb_prepend else ""
        wandb.log({f"{prefix}{name}": value for name, value in evaluation.metrics().items()}, step=env.curr_step)


_RECORDED: dict[Blame, str] = {
    "infrastructure": "infrastructure_errors",
    "task": "set_aside",
    "defect": "defects",
    "unscored": "not_scored",
}
"""The names of failures in records."""


class _Record:
    """Appends to `items.jsonl` as each item ends, and to `evaluations.jsonl` at the end; earlier evaluations stay."""

    def __init__(self, env: EvaluatedEnvironment) -> None:
        folder = env.config.data_dir_to_save_evals
        self._folder = Path(folder) if folder else None
        self._started = time.time()
        self._evaluation = {
            "evaluation": f"{env.name}-step-{env.curr_step}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(self._started))}"
        }
        self._facts = {
            "step": env.curr_step,
            "policy": env.config.policy,
            "models": env.models,
            "temperature": env.config.agent_temperature,
        }

    async def add_item(self, group: Group) -> None:
        """Write down an item's rollouts."""
        rollouts = [
            {
                "trajectory_id": trajectory.trajectory_id,
                "score": trajectory.score.value,
                "reason": trajectory.score.reason,
                "end": trajectory.end,
                "steps": trajectory.steps,
                "final_response": trajectory.final_response,
            }
            for trajectory in group.trajectories
        ]
        failures = {blame: {failure.trajectory_id: failure.reason for failure in group.blamed(blame)} for blame in _RECORDED}
        facts = {"item": group.name, "rollouts": rollouts}
        await self._append("items.jsonl", facts | {name: failures[blame] for blame, name in _RECORDED.items()})

    async def conclude(self, evaluation: Evaluation) -> None:
        """Write down the figures."""
        seconds = round(time.time() - self._started, 3)
        metrics = {name.removeprefix("eval/"): value for name, value in evaluation.metrics().items()}
        failures = {name: evaluation.failures[blame] for blame, name in _RECORDED.items()}
        facts = {**self._facts, "seconds": seconds, "metrics": metrics, **failures}
        await self._append("evaluations.jsonl", facts)

    async def _append(self, name: str, facts: dict[str, Any]) -> None:
        if self._folder is not None:
            await asyncio.to_thread(_append_line, self._folder / name, json.dumps({**self._evaluation, **facts}))


def _append_line(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
