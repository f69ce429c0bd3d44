"""atroposlib's `run-api`, as an environment sees it."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from hermes_envs.errors import HermesEnvsError

ASK_TIMEOUT_S = 30.0
POST_TIMEOUT_S = 60.0
"""A group of long sequences is tens of megabytes, which the API reads while it does nothing else."""

UNREGISTERED = -1
"""The batch size of an API that no trainer has registered with."""

Reply = TypeVar("Reply", bound=BaseModel)


class RolloutApiError(HermesEnvsError):
    """The API refused a request or answered something else than what it is known to."""


class RolloutApiAwayError(RolloutApiError):
    """Nothing answers at the API's address, or not in time."""


class UnknownEnvironmentError(RolloutApiError):
    """The API does not know this environment: it was restarted or reset."""


class Registration(BaseModel):
    """What the API tells an environment that it has registered. Steps are batches that it has made."""

    env_id: int
    wandb_name: str
    checkpoint_dir: str
    starting_step: int
    checkpoint_interval: int
    num_steps: int


class TrainerInfo(BaseModel):
    """What the trainer asked for, in sequences and tokens; all -1 until there is one."""

    batch_size: int
    max_token_len: int


class EnvironmentStatus(BaseModel):
    """How far training is, and what waits in the API's queue: sizes are in groups of the environment that asks."""

    current_step: int
    queue_size: int
    self_queue_size: int
    max_group_size: int
    unallocated_fraction: float
    env_weight: float


class WandbInfo(BaseModel):
    """Where the trainer's metrics go."""

    group: str | None
    project: str | None


class RolloutApi:
    """One question, one answer: nothing is tried again here.

    Every method raises `RolloutApiAwayError` where nobody answers and `RolloutApiError` where the answer is no use.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def register_environment(self, request: dict[str, Any]) -> Registration | None:
        """Register; None while no trainer has asked for a batch yet."""
        answer = await self._ask("POST", "/register-env", json=request)
        # Anything but success is the text "wait for trainer to start".
        if not isinstance(answer, dict) or answer.get("status") != "success":
            return None
        return self._read(Registration, answer)

    async def trainer_info(self) -> TrainerInfo:
        """The trainer's batch size and longest sequence."""
        return self._read(TrainerInfo, await self._ask("GET", "/info"))

    async def wandb_info(self) -> WandbInfo:
        """The trainer's wandb project and group."""
        return self._read(WandbInfo, await self._ask("GET", "/wandb_info"))

    async def status(self, env_id: int) -> EnvironmentStatus:
        """How far training is.

        Raises:
            UnknownEnvironmentError: no environment has this number.
        """
        try:
            answer = await self._ask("GET", "/status-env", json={"env_id": env_id})
        except RolloutApiAwayError:
            raise
        except RolloutApiError as reason:
            raise UnknownEnvironmentError(str(reason)) from reason
        return self._read(EnvironmentStatus, answer)

    async def post_group(self, compressed: bytes, timeout_s: float = POST_TIMEOUT_S) -> None:
        """Hand over a `ScoredData` object: JSON, compressed by gzip."""
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        await self._ask("POST", "/scored_data", timeout_s, data=compressed, headers=headers)

    async def disconnect_environment(self, env_id: int) -> None:
        """Say goodbye: batches no longer wait for this environment's share."""
        await self._ask("POST", "/disconnect-env", json={"env_id": env_id})

    async def _ask(self, method: str, route: str, timeout_s: float = ASK_TIMEOUT_S, **request: Any) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, self.url + route, timeout=timeout, **request) as reply:
                text = await reply.text()
        except (aiohttp.ClientError, TimeoutError) as reason:
            raise RolloutApiAwayError(f"{self.url}: {str(reason) or type(reason).__name__}") from reason
        if reply.status in (502, 503, 504):
            raise RolloutApiAwayError(f"{self.url}{route}: HTTP {reply.status}")
        if reply.status != 200:
            raise RolloutApiError(f"{self.url}{route}: HTTP {reply.status}: {text[:500]}")
        try:
            return json.loads(text)
        except ValueError as reason:
            raise RolloutApiError(f"{self.url}{route}: not JSON: {text[:200]!r}; is this atroposlib's run-api?") from reason

    def _read(self, kind: type[Reply], answer: Any) -> Reply:
        try:
            return kind.model_validate(answer)
        except ValidationError as reason:
            raise RolloutApiError(f"{self.url}: {str(answer)[:200]!r}; is this atroposlib's run-api?") from reason
