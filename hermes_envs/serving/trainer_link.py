"""An environment's place at `run-api`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hermes_envs.errors import ConfigError
from hermes_envs.serving.rollout_api import (
    UNREGISTERED,
    EnvironmentStatus,
    Registration,
    RolloutApi,
    RolloutApiAwayError,
    RolloutApiError,
    TrainerInfo,
)

FIRST_RETRY_S, LAST_RETRY_S = 0.25, 2.0
"""Short even after a long time: an API that comes back must be noticed before another environment gets this one's number."""
MOST_UNCONFIRMED = 3
"""Registrations in a row that the API may have forgotten by the next question."""

Answer = TypeVar("Answer")


@dataclass
class Waiting:
    """Says what is waited for: once, and then every minute."""

    tell: Callable[[str], None]
    since: float = field(default_factory=time.monotonic)
    told_at: float | None = None

    def tell_now_and_then(self, text: str) -> None:
        """Say it, unless that was done within the last minute."""
        if self.told_at is None or time.monotonic() - self.told_at > 60:
            self.tell(text)
            self.told_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has been."""
        return time.monotonic() - self.since


class TrainerLink:
    """Registers, and asks how far training is; both wait as long as nobody answers.

    `request` is what to register, `tell` shows a user what is waited for, and `pause` lets so many seconds pass. An API that is
    not there at first is given `patience_s` seconds to come up; one that was there is waited for without end, for a trainer
    that comes back goes on from its checkpoint.
    """

    def __init__(
        self,
        api: RolloutApi,
        request: dict[str, Any],
        *,
        tell: Callable[[str], None],
        pause: Callable[[float], Awaitable[None]],
        patience_s: float,
    ) -> None:
        self._api = api
        self._request = request
        self._tell = tell
        self._pause = pause
        self._patience_s = patience_s
        self.registration: Registration | None = None
        self.trainer = TrainerInfo(batch_size=UNREGISTERED, max_token_len=UNREGISTERED)
        self._unconfirmed = 0
        self.is_usable = False
        """Whether the API may get groups of this size."""

    @property
    def env_id(self) -> int:
        """The environment's number. It must have registered."""
        assert self.registration is not None
        return self.registration.env_id

    async def register(self) -> Registration:
        """Wait for a trainer and register with it.

        Raises:
            ConfigError: there is no API, or the trainer's batches cannot be made of such groups.
            RolloutApiError: it answers what the API does not.
        """
        if self._unconfirmed == MOST_UNCONFIRMED:
            raise RolloutApiError(f"run-api at {self._api.url} registers environments, but does not know them afterwards")
        waiting = Waiting(self._tell)
        while True:
            registration = await self._patiently(lambda: self._api.register_environment(self._request))
            self.trainer = await self._patiently(self._api.trainer_info)
            if registration is not None and self.trainer.batch_size != UNREGISTERED:
                break
            waiting.tell_now_and_then(f"run-api at {self._api.url} is there; waiting for a trainer to ask it for batches")
            await self._pause(LAST_RETRY_S)
        self._unconfirmed += 1
        self.registration, self.is_usable = registration, False
        self._check_batch_size()
        self.is_usable = True
        return registration

    def _check_batch_size(self) -> None:
        batch_size, group_size = self.trainer.batch_size, self._request["group_size"]
        if batch_size < group_size or batch_size % group_size:
            raise ConfigError(
                f"group_size: the trainer at {self._api.url} asked for batches of {batch_size} sequences, which groups of "
                f"{group_size} never fill exactly; make batch_size a multiple of group_size"
            )

    async def status(self) -> EnvironmentStatus:
        """How far training is.

        Raises:
            UnknownEnvironmentError: the API has forgotten this environment and everything else; it must register again.
        """
        status = await self._patiently(lambda: self._api.status(self.env_id))
        self._unconfirmed = 0
        return status

    async def _patiently(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        waiting, delay_s = Waiting(self._tell), FIRST_RETRY_S
        while True:
            try:
                return await ask()
            except RolloutApiAwayError as reason:
                if self.registration is None and waiting.seconds > self._patience_s:
                    raise ConfigError(
                        f"rollout_server_url: no run-api has answered for {self._patience_s:g} s: {reason}; start it and a "
                        "trainer, or use `process`, which needs neither"
                    ) from reason
                # It closes a connection after an error of its own, which the next request then runs into.
                if waiting.seconds >= FIRST_RETRY_S:
                    waiting.tell_now_and_then(f"run-api does not answer, trying again: {reason}")
            await self._pause(delay_s)
            delay_s = min(2 * delay_s, LAST_RETRY_S)
