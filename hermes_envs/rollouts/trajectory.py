"""What one rollout leaves behind, and how it was judged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from hermes_envs.policies.base import Message
from hermes_envs.policies.token_record import TokenRecord
from hermes_envs.tools.call import ToolResult

Phase = Literal["setup", "model", "tools", "grading"]
End = Literal["stop", "length", "max_steps", "context", "timeout"]
"""Why an episode ended: the model stopped, its last turn was cut off; the steps, the context or the time ran out."""


@dataclass
class Stopwatch:
    """Seconds that a trajectory spent in each phase."""

    seconds: dict[Phase, float] = field(default_factory=lambda: {"setup": 0.0, "model": 0.0, "tools": 0.0, "grading": 0.0})

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Add the length of the block to a phase, whether it succeeds or not."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started


@dataclass
class ToolCounts:
    """How a trajectory's tool calls went. `errors` has one line for each call that did not work."""

    attempted: int = 0
    schema_valid: int = 0
    executed_ok: int = 0
    exec_error: int = 0
    errors: list[str] = field(default_factory=list)

    def count(self, result: ToolResult) -> None:
        """Add one call."""
        self.attempted += 1
        self.schema_valid += result.executed
        self.executed_ok += result.executed and result.ok
        self.exec_error += result.executed and not result.ok
        if not result.ok:
            self.errors.append(f"{result.call.name}: {result.content[:200]}")


@dataclass(frozen=True)
class Score:
    """A reward, and why in one line. `details`, anything that JSON can say, goes into the trajectory's metadata."""

    value: float
    reason: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no trainer could use and no file could hold.

        Raises:
            TypeError, ValueError: the value is no finite number, or the details are not JSON.
        """
        if not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise ValueError(f"a score is a finite number, not {self.value!r}")
        json.dumps(self.details, allow_nan=False)


@dataclass(frozen=True)
class Episode:
    """What an agent did, not judged yet: the transcript, the exact tokens if there are any, and why it ended."""

    trajectory_id: str
    messages: list[Message]
    record: TokenRecord
    end: End
    steps: int
    tool_counts: ToolCounts
    stopwatch: Stopwatch

    @property
    def final_response(self) -> str:
        """The text of the last assistant message; empty if the model said nothing."""
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                return str(message.get("content") or "")
        return ""

    def scored(self, score: Score) -> Trajectory:
        """The finished rollout.

        Raises:
            TypeError: an environment has returned something else than a score.
        """
        if not isinstance(score, Score):
            raise TypeError(f"verify_and_score_trajectory returned {score!r}, not a Score")
        return Trajectory(**vars(self), score=score)


@dataclass(frozen=True)
class Trajectory(Episode):
    """One finished rollout: an episode and its score."""

    score: Score

    def metadata(self) -> dict[str, Any]:
        """What the record keeps beside tokens and messages."""
        return {
            **self.score.details,
            "trajectory_id": self.trajectory_id,
            "end": self.end,
            "steps": self.steps,
            "engine_calls": self.record.engine_calls,
            "tool_calls_attempted": self.tool_counts.attempted,
            "tool_calls_schema_valid": self.tool_counts.schema_valid,
            "tool_calls_executed_ok": self.tool_counts.executed_ok,
            "tool_calls_exec_error": self.tool_counts.exec_error,
            "tool_errors": self.tool_counts.errors,
            "seconds": {phase: round(seconds, 4) for phase, seconds in self.stopwatch.seconds.items()},
            "score_reason": self.score.reason,
        }
