"""What can go wrong above the sandboxes.

    HermesEnvsError
    ├── ConfigError               an option cannot work; the message names the field and what would help
    ├── DatasetError              a task set cannot be read; the message names the file or the column
    ├── NothingCollectedError     a run ended without a single trajectory
    ├── EnvironmentBuildError     a task's environment cannot be built: the task is quarantined, nobody is scored
    ├── EnvironmentDefectError    the code of an environment fails on every task that it is given
    ├── PhaseTimeoutError         the set-up or the grading of a rollout took longer than its task allows
    ├── NotScoredError            an environment does not score what a rollout came to: it is dropped and counted
    ├── RecordingError            a terminal recording is not what its format says; the message names the line
    ├── TaskBuildError            a package or tree cannot be made into tasks
    ├── TrainingError             a training run cannot go on: a service that it needs is gone, or a process of it has ended
    ├── ToolServerError           the external tool server failed: it does not answer, or not with a result
    └── EngineError               the inference engine failed; `retryable` says whether another rollout may succeed
        ├── EngineUnavailableError    it cannot be reached, broke off, or is overloaded: the same request may succeed later
        ├── EngineRefusalError        it refuses the request, and would refuse it again
        └── InexactRolloutError       the record of a rollout would not be what the engine saw and produced

`backends.errors.SandboxError` stands beside this tree: it is raised through this package unchanged. `EngineError`,
`ToolServerError`, `PhaseTimeoutError` and `SandboxError` are infrastructure: a trajectory that ends in one is tried again or
dropped and counted, never scored 0.
"""

from __future__ import annotations

from typing import ClassVar


class HermesEnvsError(Exception):
    """Base of all errors of this package."""


class ConfigError(HermesEnvsError):
    """An option cannot work; the message names the field and what would help."""


class DatasetError(HermesEnvsError):
    """A task set cannot be read; the message names the file or the column."""


class NothingCollectedError(HermesEnvsError):
    """A run ended without a single trajectory; the message says why, or the account before it does."""


class EnvironmentBuildError(HermesEnvsError):
    """The environment of a task cannot be built; the task is set aside and reported, never scored."""


class EnvironmentDefectError(HermesEnvsError):
    """The code of an environment raises what it should not on every task that it is given; the message has the last."""


class PhaseTimeoutError(HermesEnvsError):
    """The set-up or the grading of a rollout took longer than its task allows: infrastructure, not the agent's doing."""


class NotScoredError(HermesEnvsError):
    """Raised by an environment that does not score what a rollout came to, such as one that ran out of time."""


class RecordingError(HermesEnvsError):
    """A terminal recording is not what its format says; the message names the line."""


class TaskBuildError(HermesEnvsError):
    """A package or tree cannot be made into tasks; the message says what failed."""


class TrainingError(HermesEnvsError):
    """A training run cannot go on: a service that it needs is gone, or a process that belongs to it has ended."""


class ToolServerError(HermesEnvsError):
    """The external tool server cannot be reached, or answered something else than a result. A tool that fails is a result."""


class EngineError(HermesEnvsError):
    """The inference engine timed out, or answered something that cannot be used.

    `retryable` is whether another rollout may succeed. The request itself is sent again for `EngineUnavailableError` alone.
    """

    retryable: ClassVar[bool] = True


class EngineUnavailableError(EngineError):
    """The engine cannot be reached, broke the connection off, or is overloaded: the same request may succeed later.

    `is_away`: there was no engine to answer. `retry_after_s` is how many seconds the engine asks to wait, if it says so.
    """

    def __init__(self, message: str, *, is_away: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.is_away = is_away
        self.retry_after_s = retry_after_s


class EngineRefusalError(EngineError):
    """The engine refuses the request for a reason that does not pass: its key, its model, its length."""

    retryable = False


class InexactRolloutError(EngineError):
    """What would be recorded is not what the engine saw and produced: a defect of the engine or of its configuration."""

    retryable = False
