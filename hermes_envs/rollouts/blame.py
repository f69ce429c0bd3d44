"""The boundary that assigns blame: what ends a rollout without a score, and whether it is worth another try."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from backends.errors import SandboxError
from hermes_envs.errors import (
    EngineError,
    EnvironmentBuildError,
    HermesEnvsError,
    NotScoredError,
    PhaseTimeoutError,
    ToolServerError,
)
from hermes_envs.rollouts.group import FailedRollout

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

INFRASTRUCTURE = (SandboxError, EngineError, ToolServerError, PhaseTimeoutError)


async def attempt(
    name: str, action: Callable[[], Awaitable[Result]], *, attempts: int, env_name: str
) -> Result | FailedRollout:
    """Do it, up to `attempts` times while infrastructure fails in a way that may pass. What this raises ends the run."""
    number = 0
    while True:
        number += 1
        try:
            return await action()
        except EnvironmentBuildError as reason:
            return FailedRollout(name, str(reason), number, "task")
        except NotScoredError as reason:
            return FailedRollout(name, str(reason), number, "unscored")
        except INFRASTRUCTURE as reason:
            problem = f"{type(reason).__name__}: {reason}"
            logger.warning("%s: attempt %d of %d: %s", name, number, attempts, problem)
            may_pass = not isinstance(reason, EngineError) or reason.retryable
            if number == attempts or not may_pass:
                return FailedRollout(name, problem, number, may_pass=may_pass)
        except HermesEnvsError:
            raise
        except Exception as reason:
            problem = f"{type(reason).__name__} in {env_name}: {reason}"
            logger.exception("%s: %s", name, problem)
            return FailedRollout(name, problem, number, "defect")
