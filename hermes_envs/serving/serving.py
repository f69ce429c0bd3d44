"""Serves a trainer through atroposlib's `run-api`.

In the place of `BaseEnv.env_manager` of atroposlib 0.4, which cancels rollouts and begins them anew whenever the queue is full,
drops an item whose rollouts take long, forgets a group that could not be sent, and ends with a traceback when the API is
away. Here a rollout that has begun is finished: a group begins only if there will be room for it in the queue, so that none has
to be cancelled for being one too many.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Sequence
from typing import Any

from atroposlib.envs.base import EvalHandlingEnum

from backends.teardown import finish
from hermes_envs.errors import ConfigError, HermesEnvsError
from hermes_envs.runs.reporter import Reporter
from hermes_envs.serving.data_order import Ticket
from hermes_envs.serving.environment import ServedEnvironment
from hermes_envs.serving.outbox import Item, Outbox
from hermes_envs.serving.rollout_api import (
    EnvironmentStatus,
    RolloutApi,
    RolloutApiAwayError,
    RolloutApiError,
    UnknownEnvironmentError,
)
from hermes_envs.serving.schedule import Schedule
from hermes_envs.serving.trainer_link import TrainerLink, Waiting

POLL_S = 0.25
API_PATIENCE_S = 300.0
"""How long a `run-api` that is started together with this may take to come up."""
FAREWELL_S = 10.0
"""How long handing over what is finished may take at the end."""
LONGEST_REST_S = 60.0
FIRST_COMPLAINT = 16
"""So many dropped groups are told of where hardly any is served, and then twice as many each time."""
EQUAL_SCORES, INCOMPLETE = "equal scores", "incomplete"

logger = logging.getLogger(__name__)


def check_options(config: Any) -> None:
    """Refuse what cannot work with a trainer.

    Raises:
        ConfigError: names the option.
    """
    if config.policy != "tokens":
        raise ConfigError(f"env.policy: {config.policy!r} has no exact tokens; a trainer needs policy: tokens")
    if config.max_batches_offpolicy < 1:
        raise ConfigError("max_batches_offpolicy: with less than 1 no group would ever begin")
    if config.inference_weight <= 0:
        raise ConfigError("inference_weight: the API divides by the sum of all weights; it must be above 0")
    if config.worker_timeout > 0:
        limits = {
            name: limit for name, limit in config.model_dump().items() if name.endswith("timeout_s") and limit is not None
        }
        if "rollout_timeout_s" not in config.model_fields_set:
            # Its default is there to end what hangs.
            del limits["rollout_timeout_s"]
        longest = max(limits, key=lambda name: float(limits[name]))
        if config.worker_timeout <= limits[longest]:
            raise ConfigError(
                f"worker_timeout: {config.worker_timeout:g} s would end a group that is within {longest} "
                f"({limits[longest]:g} s); raise it, or set it to -1: every phase of a rollout has a limit of its own"
            )


class Serving:
    """Rolls out groups for a trainer until it has made `total_steps` batches, there are no more items, or SIGTERM comes."""

    def __init__(self, env: ServedEnvironment, *, api_patience_s: float = API_PATIENCE_S) -> None:
        """Raises: ConfigError: an option cannot work with a trainer."""
        check_options(env.config)
        self._env, self._config = env, env.config
        self._api = RolloutApi(env.config.rollout_server_url)
        self._outbox = Outbox(self._api)
        self._order = env.data_order()
        self._schedule = Schedule(env, self._order)
        self._reporter = Reporter(env.name or type(env).__name__)
        request = {
            "max_token_length": env.config.max_token_length,
            "desired_name": env.config.wandb_name,
            "weight": env.config.inference_weight,
            "min_batch_allocation": env.config.min_batch_allocation,
            "group_size": env.config.group_size,
        }
        self._link = TrainerLink(self._api, request, tell=self._reporter.tell, pause=self._pause, patience_s=api_patience_s)
        self._workers: dict[asyncio.Task[list[Item]], Ticket] = {}
        self._exhausted = self._is_complete = self._told_to_stop = False
        self._failures_in_a_row, self._rest_until = 0, 0.0
        self._idle = Waiting(self._reporter.tell)

    async def run(self) -> None:
        """Serve. The environment must be `running`. SIGTERM ends it in order; so does whatever is raised.

        Raises:
            ConfigError: there is no API, or its trainer's batches cannot be made of such groups.
            RolloutApiError: the API refuses a group or answers what it should not.
        """
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop, task)
        problem: HermesEnvsError | None = None
        try:
            async with self._api:
                try:
                    await self._serve()
                except HermesEnvsError as reason:
                    problem = reason
                finally:
                    await finish(self._wind_up())
        except asyncio.CancelledError:
            if not self._told_to_stop or task.uncancel():
                raise
        finally:
            self._reporter.conclude(self._env.summary)
        # Whatever has ended serving is said, even if a stop came while it was winding up.
        if problem is not None:
            raise problem

    def _stop(self, task: asyncio.Task[Any]) -> None:
        if not self._told_to_stop:
            self._told_to_stop = True
            task.cancel()

    async def _serve(self) -> None:
        await self._begin()
        status = await self._status()
        while not self._is_over(status):
            await self._note_step(status)
            await self._send()
            await self._start_workers(status)
            await self._wait_for_workers()
            status = await self._status()
        await self._note_step(status)
        self._is_complete = status.current_step >= self._total_steps
        await self._schedule.finish()

    # --- the trainer ---------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        registration = await self._register()
        self._env.curr_step = registration.starting_step
        if restored := await self._schedule.restore(registration.starting_step):
            self._reporter.tell(f"going on with the items where {restored} says")
        if self._config.use_wandb:
            info = await self._api.wandb_info()
            await self._env.start_wandb(info.project, registration.wandb_name, info.group)

    async def _register(self) -> Any:
        registration = await self._link.register()
        trainer = self._link.trainer
        self._outbox.send_again(registration.starting_step)
        self._schedule.registration = registration
        self._env.enroll(registration, trainer)
        self._total_steps = self._config.total_steps if self._config.total_steps >= 0 else registration.num_steps
        if self._total_steps < 0:
            raise ConfigError("total_steps: is -1, for the trainer to decide, but the trainer says -1, too")
        self._reporter.tell(
            f"registered as {registration.wandb_name} at step {registration.starting_step} of {self._total_steps}: batches of "
            f"{trainer.batch_size} sequences, groups of {self._config.group_size}, {self._outbox.waiting} to send"
        )
        return registration

    async def _status(self) -> EnvironmentStatus:
        """How far training is; an API that has forgotten everything gets the environment and its groups anew."""
        while True:
            try:
                status = await self._link.status()
            except UnknownEnvironmentError:
                self._reporter.tell("run-api was restarted or reset; registering again")
                await self._register()
            else:
                self._outbox.note_queue(status.self_queue_size, status.current_step)
                return status

    def _is_over(self, status: EnvironmentStatus) -> bool:
        nothing_left = self._exhausted and not self._workers and not self._outbox.waiting
        return nothing_left or status.current_step >= self._total_steps

    async def _send(self) -> None:
        try:
            await self._outbox.send(self._link.env_id)
        except (RolloutApiAwayError, UnknownEnvironmentError) as reason:
            logger.warning("%d finished groups wait: %s", self._outbox.waiting, reason)
            await self._pause(1.0)

    async def _note_step(self, status: EnvironmentStatus) -> None:
        self._env.limit_requests(status.env_weight)
        await self._schedule.note_step(
            status, lambda step: [*self._outbox.tickets(step), *self._workers.values()], self._metrics(status)
        )

    def _metrics(self, status: EnvironmentStatus) -> dict[str, Any]:
        summary = self._env.summary
        return {
            "serve/groups_served": summary.groups_served,
            **{f"serve/groups_dropped/{reason}": groups for reason, groups in summary.groups_dropped.items()},
            "serve/infrastructure_errors": summary.infrastructure_errors,
            "serve/groups_in_queue": status.queue_size,
            "serve/groups_underway": len(self._workers),
        }

    # --- groups --------------------------------------------------------------------------------------------------------

    def _room(self, status: EnvironmentStatus) -> int:
        """How many more groups may begin: no more than there are workers, than may be queued, and than are still needed."""
        config, batch_size = self._config, self._link.trainer.batch_size
        batches: int = min(config.max_batches_offpolicy, self._total_steps - status.current_step)
        workers: int = self._env.max_num_workers
        if self._schedule.is_evaluating and config.eval_handling is not EvalHandlingEnum.NONE:
            workers = 0 if config.eval_handling is EvalHandlingEnum.STOP_TRAIN else int(workers * config.eval_limit_ratio)
        own_share = config.min_batch_allocation or 0.0
        sequences = batches * round(batch_size * (status.unallocated_fraction + own_share))
        of_others = status.queue_size - status.self_queue_size
        room: int = sequences // config.group_size - of_others
        if config.min_batch_allocation is not None:
            # A batch is made of packs as large as the largest group, and waits for the packs allotted to an environment.
            packs = math.ceil(own_share * batch_size * batches / status.max_group_size)
            room = max(room, packs * max(1, status.max_group_size // config.group_size))
        unbatched = self._outbox.unbatched + len(self._workers)
        return min(workers - len(self._workers), room - unbatched)

    async def _start_workers(self, status: EnvironmentStatus) -> None:
        room: int = 0 if time.monotonic() < self._rest_until else self._room(status)
        if room > 0 or self._workers or self._schedule.is_evaluating:
            self._idle = Waiting(self._reporter.tell, told_at=time.monotonic())
        else:
            self._idle.tell_now_and_then(
                f"the trainer has made no step for {self._idle.seconds:.0f} s; it is at {status.current_step}, and "
                f"{status.queue_size} groups wait for it"
            )
        while room > 0 and not self._exhausted:
            ticket = await self._order.take()
            if ticket is None:
                self._exhausted = True
                return
            self._workers[asyncio.create_task(self._roll_out(ticket.item), name="group")] = ticket
            room -= 1

    async def _roll_out(self, item: Any) -> list[Item]:
        """What the trainer gets of an item: nothing, if that would teach nothing."""
        limit_s = self._config.worker_timeout if self._config.worker_timeout > 0 else None
        try:
            async with asyncio.timeout(limit_s) as limit:
                items, failures = await self._env.collect_trajectories(item)
        except TimeoutError:
            if not limit.expired():
                raise
            return self._drop(item, f"worker_timeout of {limit_s:g} s")
        if not items:
            if any(failure.blame != "unscored" for failure in failures):
                self._rest_after_failures()
            return self._drop(item, INCOMPLETE)
        self._failures_in_a_row = 0
        if problem := self._problem(items):
            return self._drop(item, problem)
        await self._env.record_items(items, item)
        if not self._config.include_messages:
            for data in items:
                data.pop("messages", None)
        return items

    def _problem(self, items: Sequence[Item]) -> str | None:
        sizes = {len(data["tokens"]) for data in items}
        if sizes != {self._config.group_size}:
            raise ConfigError(f"group_size: an item of {sizes} sequences where {self._config.group_size} were registered")
        if self._config.ensure_scores_are_not_same and all(len(set(data["scores"])) == 1 for data in items):
            return EQUAL_SCORES
        limit = self._link.trainer.max_token_len
        if limit > 0 and any(len(tokens) >= limit for data in items for tokens in data["tokens"]):
            return "too long"
        return None

    def _drop(self, item: Any, reason: str) -> list[Item]:
        dropped = self._env.summary.groups_dropped
        dropped[reason] = dropped.get(reason, 0) + 1
        total, served = sum(dropped.values()), self._env.summary.groups_served
        if total >= FIRST_COMPLAINT and not total & (total - 1) and total > 9 * served:
            self._reporter.tell(f"{total} groups were dropped and {served} served: {dropped}")
        # The others are ordinary, or have been told of.
        level = logging.INFO if reason in (EQUAL_SCORES, INCOMPLETE) else logging.WARNING
        logger.log(level, "%s: group dropped: %s", self._env.item_name(item), reason)
        return []

    def _rest_after_failures(self) -> None:
        """Where nothing works, such as while the engine is away, do not run through all items.

        Raises:
            EnvironmentDefectError: the environment's code fails on every item.
        """
        self._env.summary.give_up_on_defects(max(3, self._env.max_num_workers))
        self._failures_in_a_row += 1
        excess = self._failures_in_a_row - self._env.max_num_workers
        if excess > 0:
            rest_s = min(2.0 ** min(excess, 10), LONGEST_REST_S)
            self._rest_until = time.monotonic() + rest_s
            logger.warning("the last %d groups all failed; the next begins in %g s", self._failures_in_a_row, rest_s)

    async def _wait_for_workers(self) -> None:
        if self._workers:
            await asyncio.wait(self._workers, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(POLL_S)
        self._take_finished()

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._take_finished()

    def _take_finished(self) -> None:
        """Put what workers finished into the outbox. Raises: what ended a worker: a defect of the run as a whole."""
        if problems := self._collect_finished():
            raise problems[0]

    def _collect_finished(self) -> list[BaseException]:
        problems: list[BaseException] = []
        for worker in [worker for worker in self._workers if worker.done()]:
            ticket = self._workers.pop(worker)
            if worker.cancelled():
                self._drop(ticket.item, "cancelled")
            elif (problem := worker.exception()) is not None:
                problems.append(problem)
            elif items := worker.result():
                self._outbox.add(ticket, items)
                self._schedule.items_sent += len(items)
                self._env.summary.groups_served += 1
        return problems

    # --- the end -------------------------------------------------------------------------------------------------------

    async def _wind_up(self) -> None:
        """Leave nothing running; hand over what is finished, or keep it in a file; save the order of the items."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, self._schedule.stop(), return_exceptions=True)
        begun = [self._workers.pop(worker) for worker in list(self._workers) if worker.cancelled()]
        self._collect_finished()
        has_everything = await self._say_goodbye()
        last = self._env.curr_step
        # A trainer that ends now has perhaps not had all batches that were made at once.
        steps = range(max(0, last - self._outbox.batches), last + 1) if self._link.registration is not None else ()
        unfinished = {step: [*self._outbox.tickets(step), *begun] for step in steps}
        if not has_everything and not self._is_complete:
            # Whatever the API had in its queue is of no more use to a trainer.
            self._outbox.send_again(last)
        for step, tickets in unfinished.items():
            await self._schedule.save(step, tickets)
        if self._outbox.waiting:
            path = self._config.cache_path / "unsent" / f"{self._config.wandb_name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
            try:
                await self._outbox.write(path)
            except OSError as reason:
                logger.error("%d finished groups are lost, %s cannot be written: %s", self._outbox.waiting, path, reason)
            else:
                self._reporter.tell(f"{self._outbox.waiting} finished groups could not be sent; they are in {path}")

    async def _say_goodbye(self) -> bool:
        """Whether the trainer has everything that is finished, as far as it may have it."""
        if self._link.registration is None:
            return True
        with contextlib.suppress(RolloutApiError, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                if self._link.is_usable and not self._is_complete:
                    status = await self._api.status(self._link.env_id)
                    self._outbox.note_queue(status.self_queue_size, status.current_step)
                    self._env.curr_step = status.current_step
                    await self._outbox.send(self._link.env_id, FAREWELL_S)
                await self._api.disconnect_environment(self._link.env_id)
                return self._link.is_usable
        return False
