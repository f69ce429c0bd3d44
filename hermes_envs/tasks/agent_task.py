"""What a trajectory starts from, and what it may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backends.base import Layer
from hermes_envs.policies.base import Message, Reference


@dataclass(frozen=True)
class TaskLimits:
    """What one rollout of a task may use; None is what the run's options say.

    Wall times are in seconds. `setup_s` and `grading_s` limit hooks of the environment: more is an infrastructure failure.
    `agent_s` limits the agent, `rollout_s` set-up and agent together from when there is a slot: an agent that is still at work
    then ends with `timeout`, and grading may take as long again. `network` True needs `allow_network`; False takes the network
    away from this task alone. `memory_bytes` lowers the slot's limit.
    """

    setup_s: float | None = None
    agent_s: float | None = None
    grading_s: float | None = None
    rollout_s: float | None = None
    memory_bytes: int | None = None
    network: bool | None = None


@dataclass(frozen=True)
class AgentTask:
    """A task, made once for all rollouts of a group: what the agent reads, what its workspace has, and how it can be solved.

    `layer` is what the workspace starts from and `reference` the known solution, which policy `oracle` plays. `item` is what
    the task was built from; `AgentEnv` fills it in. An environment whose hooks need more derives a class of its own.
    """

    prompt: Sequence[Message]
    layer: Layer | None = None
    reference: Reference | None = None
    limits: TaskLimits = TaskLimits()
    item: Any = None

    def __post_init__(self) -> None:
        """Raises: TypeError: the prompt is not messages."""
        if not all(isinstance(message, dict) for message in self.prompt):
            raise TypeError(f"the prompt of a task is a list of messages, not {self.prompt!r:.100}")
