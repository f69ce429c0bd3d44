"""The base of all environments: owns the backend, the rollouts and what becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import logging
import re
import secrets
import signal
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import jsonlines
from atroposlib.envs.base import APIServerConfig, BaseEnv
from atroposlib.envs.server_handling.server_baseline import ServerBaseline

from backends import create_tool_backend
from backends.base import Slot, ToolBackend
from backends.errors import BackendConfigError
from backends.no_sandbox import NoSandbox
from hermes_envs.env_config import AgentEnvConfig
from hermes_envs.errors import ConfigError, EnvironmentBuildError
from hermes_envs.policies import create_policy
from hermes_envs.policies.base import Policy
from hermes_envs.rollouts.agent import Agent, AgentOptions
from hermes_envs.rollouts.blame import Result, attempt
from hermes_envs.rollouts.group import FailedRollout, Group
from hermes_envs.rollouts.time_limits import phase_limit, time_limit
from hermes_envs.rollouts.trajectory import Episode, Score, Stopwatch, Trajectory
from hermes_envs.runs import command_line
from hermes_envs.runs.atropos import PLACEHOLDER_TOKENIZER, UnusedServer, flushing_writer, start_wandb, usable_endpoints
from hermes_envs.runs.collection import collect
from hermes_envs.runs.evaluation import evaluate
from hermes_envs.runs.html_report import write_html_report
from hermes_envs.runs.reporter import Reporter
from hermes_envs.runs.summary import Summary
from hermes_envs.serving.data_order import DataOrder
from hermes_envs.serving.rollout_api import Registration, TrainerInfo
from hermes_envs.serving.serving import Serving
from hermes_envs.tasks.agent_task import AgentTask
from hermes_envs.tasks.task_order import TaskOrder
from hermes_envs.tools.executor import ToolExecutor
from hermes_envs.tools.external import ExternalTool
from hermes_envs.tools.tool_server_client import external_tools
from hermes_envs.tools.toolsets import Toolsets
from hermes_envs.workspace import Workspace

__all__ = ["AgentEnv", "AgentEnvConfig", "AgentTask", "OrderedEnv"]

logger = logging.getLogger(__name__)


class AgentEnv(BaseEnv):  # type: ignore[misc]
    """Rolls an agent out on tasks and scores what it did.

    A new environment overrides `get_next_item`, `build_task` and a way to score: `score_trajectory` when the final response
    decides, `verify_and_score_trajectory` when the workspace does. docs/new_environment.md shows how.
    """

    env_config_cls: ClassVar[type[AgentEnvConfig]] = AgentEnvConfig
    toolsets: ClassVar[Toolsets] = Toolsets()
    own_external_tools: ClassVar[Sequence[ExternalTool]] = ()
    """What `tool_server_url: inprocess` offers."""
    needs_sandbox: ClassVar[bool] = True
    """Whether trajectories get a slot of a backend; without one, their tools are those of a tool server alone."""

    server_cls = UnusedServer

    config: AgentEnvConfig
    backend: ToolBackend
    policy: Policy
    jsonl_writer: jsonlines.Writer

    def __init__(
        self,
        config: AgentEnvConfig,
        server_configs: ServerBaseline | list[APIServerConfig],
        slurm: bool = False,
        testing: bool = False,
    ) -> None:
        servers = usable_endpoints(config.policy, server_configs)
        self.executor = ToolExecutor(self.toolsets.resolve(config.enabled_toolsets, config.disabled_toolsets), config)
        self.executor.require_isolation(config.local_isolation != "none")
        # The trainer's API refuses an environment without a name.
        config = config.model_copy(update={"wandb_name": config.wandb_name or self.name})
        if config.policy != "tokens":
            config.tokenizer_name = str(PLACEHOLDER_TOKENIZER)
        # What atroposlib calls testing are answers made up by its own clients, which no policy asks.
        super().__init__(config, servers, slurm=slurm)
        self.summary = Summary()
        self.process_mode = False
        self.n_groups_to_process = 0
        self.group_size_to_process = config.group_size

    @classmethod
    def config_init(cls) -> tuple[AgentEnvConfig, list[APIServerConfig]]:
        """The defaults: no endpoint, and no health check: a rollout whose engine is away fails soon instead of waiting."""
        return cls.env_config_cls(), [APIServerConfig(base_url="", health_check=False)]

    @classmethod
    def cli(cls) -> None:
        """Run `serve`, `process` or `evaluate` from the command line; every foreseeable error is one line."""
        commands: dict[str, Callable[[type[AgentEnvConfig]], type]] = {
            "serve": lambda options: cls._with_options(options).get_cli_serve_config_cls(),
            "process": lambda options: cls._with_options(options).get_cli_process_config_cls(),
            "evaluate": lambda options: cls._with_options(options).get_cli_evaluate_config_cls(),
        }
        command_line.run(commands, cls.env_config_cls, cls.__doc__ or "")

    @classmethod
    def _with_options(cls, options: type[AgentEnvConfig]) -> Any:
        """This environment with options that it does not know of: those of a backend from another package."""
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "env_config_cls": options}
        return cls if options is cls.env_config_cls else type(cls.__name__, (cls,), own)

    # --- what an environment overrides ---------------------------------------------------------------------------------

    async def setup_agent_env(self) -> None:
        """Prepare what all items need, such as the task set. The backend is running."""

    @property
    def models(self) -> list[str]:
        """The names of the models that are asked."""
        return self.policy.endpoints.models

    @abstractmethod
    async def get_next_item(self) -> Any:
        """The next task, or None when there are no more."""

    def number_of_items(self) -> int | None:
        """How many items `get_next_item` has in `process`; None if nobody knows."""
        return None

    @abstractmethod
    async def build_task(self, item: Any) -> AgentTask:
        """Turn an item into what a trajectory starts from.

        Raises:
            EnvironmentBuildError: the item cannot be used; it is set aside and reported.
        """

    def build_agent_config(self, item: Any) -> AgentOptions:
        """How long the agent may go on with this item."""
        return self.config

    def data_position(self) -> Any:
        """Where `get_next_item` is, as JSON can say it, for `serve` to go on from; None if items cannot be taken again."""
        return None

    def restore_data_position(self, position: Any) -> None:
        """Have `get_next_item` go on from what `data_position` was."""
        raise NotImplementedError(f"{type(self).__name__} has positions but does not restore them")

    def item_name(self, item: Any) -> str:
        """A short name for logs and records: a number or a word as it is, a digest of anything else."""
        text = str(item)
        if isinstance(item, (int, str)) and re.fullmatch(r"[\w.-]{1,64}", text):
            return text
        return hashlib.sha256(repr(item).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    async def setup_trajectory_workspace(self, task: Any, workspace: Workspace) -> None:
        """Prepare a fresh workspace before the agent gets it. `task` is what `build_task` made, for all of these hooks."""

    async def validate_task(self, task: Any, workspace: Workspace) -> None:
        """Look whether a task can be what it says, for a policy that does nothing itself (`nop`); the workspace may be reset.

        Raises:
            EnvironmentBuildError: it rewards whoever does nothing; it is set aside and reported.
        """

    async def verify_and_score_trajectory(self, task: Any, episode: Episode, workspace: Workspace) -> Score:
        """Judge what the agent did. The workspace is as the agent left it, with nothing running.

        Raises:
            NotScoredError: an episode like this has no score, one that ended by `timeout` perhaps; it is dropped and counted.
        """
        return Score(await self.score_trajectory(task.item, episode.final_response), "final response")

    async def score_trajectory(self, item: Any, final_response: str) -> float:
        """Judge by the final response alone."""
        raise NotImplementedError(f"{type(self).__name__} scores neither the response nor the workspace")

    def held_out_items(self) -> Sequence[Any]:
        """What `evaluate` measures the policy on; none: the environment has no evaluation."""
        return ()

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Measure pass@k on the first `num_eval_tasks` items that are held out.

        Raises:
            ConfigError: none is.
        """
        items = self.held_out_items()
        if not items:
            raise ConfigError(f"{self.name} has no evaluation split; use `process`")
        await evaluate(self, items[: self.config.num_eval_tasks or None], self.config)

    # --- rollouts ------------------------------------------------------------------------------------------------------

    async def prepare_task(self, item: Any) -> AgentTask:
        """The task of an item, made once for a group.

        Raises:
            EnvironmentBuildError: the item cannot be used.
        """
        task = await self.build_task(item)
        if not isinstance(task, AgentTask):
            raise TypeError(f"build_task returned {task!r}, not an AgentTask")
        return dataclasses.replace(task, item=item)

    async def run_agent(self, task: Any, trajectory_id: str | None = None) -> Trajectory:
        """One rollout from a fresh slot to a score. The environment must be `running`. `task` may also be an item.

        Raises:
            EngineError, SandboxError, ToolServerError, PhaseTimeoutError: infrastructure failed.
            EnvironmentBuildError: the task's environment cannot be built.
            NotScoredError: the environment does not score what the rollout came to.
        """
        if not isinstance(task, AgentTask):
            task = await self.prepare_task(task)
        rollout_id = trajectory_id or f"{self.item_name(task.item)}-{secrets.token_hex(4)}"
        agent = Agent(self.executor, self.build_agent_config(task.item))
        limits, stopwatch = task.limits, Stopwatch()
        longest = limits.rollout_s or self.config.rollout_timeout_s
        async with AsyncExitStack() as stack:
            with stopwatch.measure("setup"):
                slot = await stack.enter_async_context(self._slot(rollout_id, task))
                deadline = time_limit(longest)
                workspace = Workspace(self.backend, slot)
                async with phase_limit("set-up", min(limits.setup_s or longest, longest)):
                    await self.setup_trajectory_workspace(task, workspace)
            conversation = self.policy.start(rollout_id, tools=self.executor.schemas, reference=task.reference)
            if limits.agent_s is not None:
                deadline = min(deadline, time_limit(limits.agent_s))
            episode = await agent.run(task.prompt, conversation, workspace, stopwatch, deadline=deadline)
            with stopwatch.measure("grading"):
                async with phase_limit("grading", limits.grading_s or longest):
                    if self.policy.validates:
                        await self.validate_task(task, workspace)
                    score = await self.verify_and_score_trajectory(task, episode, workspace)
        return episode.scored(score)

    @asynccontextmanager
    async def _slot(self, rollout_id: str, task: AgentTask) -> AsyncIterator[Slot]:
        limits = task.limits
        async with AsyncExitStack() as stack:
            try:
                slot = await stack.enter_async_context(
                    self.backend.slot(rollout_id, layer=task.layer, network=limits.network, memory_bytes=limits.memory_bytes)
                )
            except BackendConfigError as reason:
                raise EnvironmentBuildError(str(reason)) from reason
            yield slot

    async def collect_group(self, item: Any, size: int | None = None) -> Group:
        """Roll out `size` trajectories at once, `group_size` by default; each ends with a score or with a reason why not."""
        name = self.item_name(item)
        trajectory_ids = [f"{name}-{index}-{secrets.token_hex(4)}" for index in range(size or self.config.group_size)]
        task = await self._attempt(name, lambda: self.prepare_task(item))
        if isinstance(task, FailedRollout):
            return Group.of(name, [dataclasses.replace(task, trajectory_id=id_) for id_ in trajectory_ids])
        async with asyncio.TaskGroup() as group:
            rollouts = [
                group.create_task(self._attempt(id_, functools.partial(self.run_agent, task, id_)), name=f"rollout {id_}")
                for id_ in trajectory_ids
            ]
        # A task group outlives a member that somebody else cancelled; the rollout is lost all the same.
        outcomes = [
            FailedRollout(id_, "its task was cancelled", 1) if rollout.cancelled() else rollout.result()
            for id_, rollout in zip(trajectory_ids, rollouts, strict=True)
        ]
        return Group.of(name, outcomes)

    async def _attempt(self, name: str, action: Callable[[], Awaitable[Result]]) -> Result | FailedRollout:
        return await attempt(name, action, attempts=self.config.rollout_attempts, env_name=type(self).__name__)

    # --- a run ---------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own the backend and the policy for the length of a block; SIGTERM ends it like a cancellation."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            # atroposlib has made one of each config, or with `slurm` one for each node.
            self.policy = create_policy(self.config, [server.config for server in self.server.servers], self.tokenizer)
            async with (
                aclosing(self.policy),
                external_tools(self.config, self.own_external_tools) as external,
                create_tool_backend(self.config) if self.needs_sandbox else NoSandbox() as self.backend,
            ):
                self.executor.offer(external)
                await self.setup_agent_env()
                yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    async def setup(self) -> None:
        """atroposlib's hook; everything is set up by `running`."""

    async def env_manager(self) -> None:
        """Serve a trainer through atroposlib's API."""
        command_line.set_log_level(self.config.log_level)
        serving = Serving(self)
        if self.config.data_path_to_save_groups is not None:
            self.jsonl_writer = flushing_writer(self.jsonl_writer, self.config.data_path_to_save_groups)
        try:
            async with self.running():
                await serving.run()
        finally:
            if self.jsonl_writer is not None:
                self.jsonl_writer.close()

    def data_order(self) -> DataOrder:
        """As `ServedEnvironment.data_order`."""
        return DataOrder(self.get_next_item, self.data_position, self.restore_data_position)

    def enroll(self, registration: Registration, trainer: TrainerInfo) -> None:
        """As `ServedEnvironment.enroll`: atroposlib's methods read some of it from the environment."""
        self.env_id, self.wandb_prepend = registration.env_id, registration.wandb_name
        self.config.batch_size = trainer.batch_size
        if trainer.max_token_len > 0:
            # A sequence of that length is one too long for atroposlib.
            self.policy.limit_sequences(trainer.max_token_len - 1)
        # atroposlib warns about each group while it knows no limit.
        self.max_token_len = trainer.max_token_len if trainer.max_token_len > 0 else self.config.max_token_length

    def limit_requests(self, weight: float) -> None:
        """As `ServedEnvironment.limit_requests`."""
        self.policy.endpoints.limit_requests(weight)

    async def collect_trajectories(self, item: Any) -> tuple[list[dict[str, Any]] | None, list[FailedRollout]]:
        """As `ServedEnvironment.collect_trajectories`: items of exactly the registered size, or None."""
        started = time.monotonic()
        try:
            group = await self.collect_group(item)
        finally:
            self.task_duration.append(time.monotonic() - started)
        self.summary.add(group)
        if group.failures:
            reasons = "; ".join(failure.reason for failure in group.failures)
            logger.warning("%s: group dropped: %s", group.name, reasons)
            return None, list(group.failures)
        items = group.items()
        for data in items:
            # The trainer's API rejects a group that overrides its size.
            del data["group_overrides"]
        kept = await self.postprocess_histories(items)
        return (kept if isinstance(kept, list) else [kept]) if kept else None, []

    async def record_items(self, items: list[dict[str, Any]], item: Any) -> None:
        """As `ServedEnvironment.record_items`: atroposlib counts them for its metrics and writes them to the file of groups."""
        await self.handle_send_to_api(items, item, do_send_to_api=False, abort_on_any_max_length_exceeded=False)

    async def process_manager(self) -> None:
        """Collect `n_groups_to_process` groups into a file.

        atroposlib's own takes one group at a time and tries a failing one for ever.

        Raises:
            NothingCollectedError: no trajectory was collected.
        """
        self.config.group_size = self.group_size_to_process
        # Without a trainer nothing limits a sequence; atroposlib warns about each group unless it knows a limit.
        self.max_token_len = self.config.max_token_length
        self.jsonl_writer = flushing_writer(self.jsonl_writer, self.config.data_path_to_save_groups)
        title, groups = self.name or type(self).__name__, self.n_groups_to_process
        await self._begin(title)
        try:
            async with self.running():
                await collect(
                    self,
                    self.get_next_item,
                    groups=groups,
                    expected=min(groups, self.number_of_items() or groups),
                    size=self.config.group_size,
                    summary=self.summary,
                    title=title,
                    save=self._save_group,
                )
        finally:
            self.jsonl_writer.close()
        page = await asyncio.to_thread(write_html_report, Path(self.config.data_path_to_save_groups))
        Reporter(title).tell(f"written to {self.config.data_path_to_save_groups} and {page}")

    async def _save_group(self, item: Any, group: Group) -> None:
        await self.record_items(await self.postprocess_histories(group.items()), item)
        await self.wandb_log()

    async def _run_evaluate(self) -> None:
        """atroposlib's hook for `evaluate`."""
        await self._begin(self.name or type(self).__name__)
        async with self.running():
            await self.evaluate()

    async def _begin(self, title: str) -> None:
        command_line.set_log_level(self.config.log_level)
        await self.start_wandb(self.wandb_project, title)

    async def start_wandb(self, project: str | None, name: str, group: str | None = None) -> None:
        """Send metrics, if that is wanted and somebody has logged in."""
        if self.config.use_wandb:
            self.config.use_wandb = await asyncio.to_thread(start_wandb, project, name, self.config.model_dump(), group)

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """atroposlib's hook, with how long requests to the engine take."""
        await super().wandb_log({**self.policy.endpoints.metrics(), **(wandb_metrics or {})})


class OrderedEnv(AgentEnv):
    """Takes its items from `order`, which `setup_agent_env` makes, and can go on at a place in it."""

    order: TaskOrder[Any]

    async def get_next_item(self) -> Any:
        """The next task; `process` takes each once, a trainer gets them over and over in a new order."""
        return self.order.next(once=self.process_mode)

    def number_of_items(self) -> int:
        """All tasks that are in the order."""
        return len(self.order)

    def data_position(self) -> Sequence[int]:
        """Where it is in its tasks."""
        return self.order.position

    def restore_data_position(self, position: Sequence[int]) -> None:
        """Go on there. Raises: ConfigError: there is no such place."""
        self.order.restore_position(position)
