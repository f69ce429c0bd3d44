"""The base of all environments: owns the backend, the rollouts and what becomes of them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jsonlines
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from atroposlib.envs.server_handling.server_baseline import ServerBaseline
from pydantic import ConfigDict, Field

from backends import BackendOptions, create_tool_backend
from backends.base import Layer, ToolBackend
from backends.errors import SandboxError
from backends.no_sandbox import NoSandbox
from hermes_envs.errors import (
    ConfigError,
    EngineError,
    EnvironmentBuildError,
    HermesEnvsError,
    NothingCollectedError,
    ToolServerError,
)
from hermes_envs.policies import PolicyOptions, create_policy
from hermes_envs.policies.base import Message, Policy, Reference
from hermes_envs.rollouts.agent import Agent, AgentOptions
from hermes_envs.rollouts.group import Group, InfrastructureFailure
from hermes_envs.rollouts.trajectory import Score, Stopwatch, Trajectory
from hermes_envs.runs import command_line
from hermes_envs.runs.atropos import PLACEHOLDER_TOKENIZER, UnusedServer, flushing_writer, start_wandb, usable_endpoints
from hermes_envs.runs.group_queue import GroupQueue
from hermes_envs.runs.html_report import write_html_report
from hermes_envs.runs.summary import Reporter, Summary
from hermes_envs.services.variables import Names
from hermes_envs.serving.serving import Serving
from hermes_envs.tasks.task_order import TaskOrder
from hermes_envs.tools.executor import ToolExecutor, ToolOptions
from hermes_envs.tools.external import ExternalTool
from hermes_envs.tools.tool_server_client import ToolServerOptions, external_tools
from hermes_envs.tools.toolsets import Toolsets
from hermes_envs.workspace import Workspace

logger = logging.getLogger(__name__)


class AgentEnvConfig(BaseEnvConfig, BackendOptions, AgentOptions, ToolOptions, ToolServerOptions, PolicyOptions):  # type: ignore[misc]
    """Every option of an environment; each is an `--env.*` flag and a key below `env:` in YAML."""

    model_config = ConfigDict(extra="forbid")

    enabled_toolsets: Names = Field(["default"], description="Toolsets that the model is offered.")
    disabled_toolsets: Names = Field([], description="Toolsets whose tools are taken away again.")
    system_prompt: str = Field("", description="System message; empty for the environment's own.")
    max_concurrent_groups: int = Field(4, ge=1, description="Groups that `process` rolls out at once.")
    worker_timeout: float = Field(
        -1.0, description="Longest that `serve` waits for a group, in seconds; -1: each phase of a rollout has its own limit."
    )
    rollout_attempts: int = Field(3, ge=1, description="Times that a rollout is tried when infrastructure fails.")
    group_attempts: int = Field(2, ge=1, description="Times that a group is tried when none of its rollouts completes.")
    cache_directory: str = Field("~/.cache/hermes-envs", description="Where fetched repositories and tasks are kept.")

    @property
    def cache_path(self) -> Path:
        """`cache_directory` with the home directory in it."""
        return Path(self.cache_directory).expanduser()


def _check_stateful_tools(config: AgentEnvConfig, executor: ToolExecutor) -> None:
    stateful = [tool.name for tool in executor.tools.values() if tool.keeps_state]
    if stateful and config.require_stateful_sandbox and config.local_isolation == "none":
        raise ConfigError(
            f"require_stateful_sandbox: {', '.join(stateful)} would run without isolation; set it to false, or local_isolation "
            "to bubblewrap"
        )


@dataclass(frozen=True)
class AgentTask:
    """What a trajectory starts from: its first messages, the layer its workspace has, and the known solution for `oracle`."""

    prompt: Sequence[Message]
    layer: Layer | None = None
    reference: Reference | None = None


class AgentEnv(BaseEnv):  # type: ignore[misc]
    """Rolls an agent out on tasks and scores what it did.

    A new environment overrides `get_next_item`, `build_task` and a way to score: `score_trajectory` when the final response
    decides, `verify_and_score_trajectory` when the workspace does.
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
        _check_stateful_tools(config, self.executor)
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
        commands = {
            "serve": cls.get_cli_serve_config_cls,
            "process": cls.get_cli_process_config_cls,
            "evaluate": cls.get_cli_evaluate_config_cls,
        }
        command_line.run(commands, cls.env_config_cls, cls.__doc__ or "")

    # --- what an environment overrides ---------------------------------------------------------------------------------

    async def setup_agent_env(self) -> None:
        """Prepare what all items need, such as the task set. The backend is running."""

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
        """A short name for logs and records."""
        return str(item)

    async def setup_trajectory_workspace(self, item: Any, workspace: Workspace) -> None:
        """Prepare a fresh workspace before the agent gets it."""

    async def verify_and_score_trajectory(self, item: Any, trajectory: Trajectory, workspace: Workspace) -> Score:
        """Judge what the agent did. The workspace is as the agent left it, with nothing running."""
        return Score(await self.score_trajectory(item, trajectory.final_response), "final response")

    async def score_trajectory(self, item: Any, final_response: str) -> float:
        """Judge by the final response alone."""
        raise NotImplementedError(f"{type(self).__name__} scores neither the response nor the workspace")

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Measure the policy on held-out items."""
        raise ConfigError(f"{self.name} has no evaluation split; use `process`")

    # --- rollouts ------------------------------------------------------------------------------------------------------

    async def run_agent(self, item: Any, trajectory_id: str | None = None) -> Trajectory:
        """One rollout from a fresh slot to a score. The environment must be `running`.

        Raises:
            EngineError, SandboxError, ToolServerError: infrastructure failed.
            EnvironmentBuildError: the item's environment cannot be built.
        """
        rollout_id = trajectory_id or f"{self.item_name(item)}-{secrets.token_hex(4)}"
        agent = Agent(self.executor, self.build_agent_config(item))
        stopwatch = Stopwatch()
        async with AsyncExitStack() as stack:
            with stopwatch.measure("setup"):
                task = await self.build_task(item)
                slot = await stack.enter_async_context(self.backend.slot(rollout_id, layer=task.layer))
                workspace = Workspace(self.backend, slot)
                await self.setup_trajectory_workspace(item, workspace)
            conversation = self.policy.start(rollout_id, tools=self.executor.schemas, reference=task.reference)
            trajectory = await agent.run(task.prompt, conversation, workspace, stopwatch)
            with stopwatch.measure("grading"):
                trajectory.score = await self.verify_and_score_trajectory(item, trajectory, workspace)
        return trajectory

    async def collect_group(self, item: Any, size: int | None = None) -> Group:
        """Roll out `size` trajectories at once, `group_size` by default; each ends scored or as an infrastructure failure."""
        name = self.item_name(item)
        trajectory_ids = [f"{name}-{index}-{secrets.token_hex(4)}" for index in range(size or self.config.group_size)]
        async with asyncio.TaskGroup() as group:
            rollouts = [group.create_task(self._try_rollout(item, id_), name=f"rollout {id_}") for id_ in trajectory_ids]
        # A task group outlives a member that somebody else cancelled; the rollout is lost all the same.
        outcomes = [
            InfrastructureFailure(id_, "its task was cancelled", 1) if rollout.cancelled() else rollout.result()
            for id_, rollout in zip(trajectory_ids, rollouts, strict=True)
        ]
        return Group(
            name,
            tuple(outcome for outcome in outcomes if isinstance(outcome, Trajectory)),
            tuple(outcome for outcome in outcomes if isinstance(outcome, InfrastructureFailure)),
        )

    async def _try_rollout(self, item: Any, trajectory_id: str) -> Trajectory | InfrastructureFailure:
        """The boundary that assigns blame: what leaves here as an exception is a defect of the run as a whole."""
        attempt, problem = 0, ""
        while attempt < self.config.rollout_attempts:
            attempt += 1
            try:
                return await self.run_agent(item, trajectory_id)
            except EnvironmentBuildError as reason:
                self.summary.set_aside[self.item_name(item)] = str(reason)
                problem = f"its environment cannot be built: {reason}"
                break
            except (SandboxError, EngineError, ToolServerError) as reason:
                problem = f"{type(reason).__name__}: {reason}"
                logger.warning("%s: attempt %d of %d: %s", trajectory_id, attempt, self.config.rollout_attempts, problem)
            except HermesEnvsError:
                raise
            except Exception as reason:
                problem = f"defect in {type(self).__name__}: {type(reason).__name__}: {reason}"
                logger.exception("%s: %s", trajectory_id, problem)
                break
        return InfrastructureFailure(trajectory_id, problem, attempt)

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
        serving = Serving(self)
        if self.config.data_path_to_save_groups is not None:
            self.jsonl_writer = flushing_writer(self.jsonl_writer, self.config.data_path_to_save_groups)
        try:
            async with self.running():
                await serving.run()
        finally:
            if self.jsonl_writer is not None:
                self.jsonl_writer.close()

    async def collect_trajectories(self, item: Any) -> tuple[list[ScoredDataGroup] | None, list[Any]]:
        """atroposlib's hook in `serve`: items of exactly the registered size, or none."""
        group = await self.collect_group(item)
        self.summary.add(group)
        if group.failures:
            reasons = "; ".join(failure.reason for failure in group.failures)
            logger.warning("%s: group dropped: %s", group.name, reasons)
            return None, []
        items = group.items()
        for data in items:
            # The trainer's API rejects a group that overrides its size.
            del data["group_overrides"]
        return items, []

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
        await self._start_wandb()
        try:
            async with self.running():
                await self.collect_groups(self.n_groups_to_process, self.summary, self._save_group)
        finally:
            self.jsonl_writer.close()
        await asyncio.to_thread(write_html_report, Path(self.config.data_path_to_save_groups))

    async def collect_groups(
        self, groups: int, summary: Summary, save: Callable[[Any, Group], Awaitable[None]] | None = None
    ) -> None:
        """Collect up to `groups` groups, show how far that is, and end with the account. The environment must be `running`.

        Raises:
            NothingCollectedError: no trajectory was collected.
        """

        async def forget(item: Any, group: Group) -> None:
            """There is no file."""

        reporter = Reporter(self.name or type(self).__name__)
        queue = GroupQueue(
            next_item=self.get_next_item,
            collect=self.collect_group,
            lost=self._lost_group,
            save=save or forget,
            reporter=reporter,
            concurrency=self.config.max_concurrent_groups,
            attempts=self.config.group_attempts,
        )
        reporter.expect(min(groups, self.number_of_items() or groups))
        try:
            with reporter:
                await queue.run(groups, summary)
        finally:
            reporter.conclude(summary)
        if not summary.trajectories:
            raise NothingCollectedError("no trajectory was collected")

    async def _run_evaluate(self) -> None:
        """atroposlib's hook for `evaluate`."""
        await self._start_wandb()
        async with self.running():
            await self.evaluate()

    async def _start_wandb(self) -> None:
        if self.config.use_wandb:
            name = self.name or type(self).__name__
            self.config.use_wandb = await asyncio.to_thread(start_wandb, self.wandb_project, name, self.config.model_dump())

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """atroposlib's hook, with how long requests to the engine take."""
        await super().wandb_log({**self.policy.endpoints.metrics(), **(wandb_metrics or {})})

    def _lost_group(self, item: Any, reason: str) -> Group:
        name = self.item_name(item)
        failures = [InfrastructureFailure(f"{name}-{index}", reason, 1) for index in range(self.config.group_size)]
        return Group(name, (), tuple(failures))

    async def _save_group(self, item: Any, group: Group) -> None:
        data = await self.postprocess_histories(group.items())
        await self.handle_send_to_api(data, item, do_send_to_api=False, abort_on_any_max_length_exceeded=False)
        await self.wandb_log()


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
