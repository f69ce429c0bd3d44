"""Fix a repository so that the named tests pass.

python -m hermes_envs.swe_smith process --config configs/swe_smith.yaml
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from hermes_envs.demo import materialise
from hermes_envs.env import AgentEnvConfig, AgentTask, OrderedEnv
from hermes_envs.errors import DatasetError, EnvironmentBuildError
from hermes_envs.grading.patch import PatchError, apply_patch, capture_patch, list_files
from hermes_envs.grading.protection import Protection
from hermes_envs.grading.test_run import run_tests
from hermes_envs.repositories.python_environment import REPOSITORY, VIRTUAL_ENVIRONMENT, PythonEnvironment, installed_modules
from hermes_envs.repositories.repository import RepositoryCache
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.tasks.task_order import TaskOrder
from hermes_envs.tasks.task_set import Row, TaskSet, missing_columns
from hermes_envs.tools.call import ToolCall
from hermes_envs.workspace import Workspace
from sandbox_image.protocol import WORKSPACE

_REQUIRED_COLUMNS = ("instance_id", "repo", "problem_statement", "patch", "FAIL_TO_PASS", "PASS_TO_PASS")
_SHOWN_FAILURES = 20
_SHOWN_PATCH_CHARS = 100_000

SYSTEM_PROMPT = """\
You are a software engineer. A repository is checked out in your working directory. Fix the problem that the user describes
by editing the source code with the tools you have; run its tests as you like. Changes to tests and to the configuration of
the test runner are not kept. When the problem is fixed, say so without calling a tool.
"""


class SweSmithConfig(AgentEnvConfig):
    """Options of the `swe_smith` environment."""

    dataset_name: str = Field(
        "NousResearch/SWE-smith-oracle",
        description="`demo`, a folder with tasks.jsonl, a .jsonl or .parquet file, or a dataset of the Hugging Face hub.",
    )
    dataset_split: str = Field("train", description="Split of a hub dataset.")
    max_items: int = Field(0, ge=0, description="Use only so many tasks; 0 for all.")
    shuffle: bool = Field(True, description="Take the tasks in random order.")
    seed: int = Field(0, description="Seed of that order.")
    python_only: bool = Field(True, description="Leave out rows whose tests are not pytest node ids of Python files.")
    score_include_fail_to_pass: bool = Field(True, description="Require FAIL_TO_PASS beside PASS_TO_PASS.")
    prompt_mode: Literal["problem_statement", "problem_statement+text"] = Field(
        "problem_statement", description="Which columns the model gets to read."
    )
    repo_base_url: str = Field(
        "", description="Where OWNER/NAME.git is found; empty for the task folder's own `repositories`, else GitHub."
    )
    install_timeout_s: float = Field(600.0, gt=0, description="Longest that a step of building an environment may take.")
    test_timeout_s: float = Field(600.0, gt=0, description="Longest that the tests may take.")


@dataclass(frozen=True)
class SweRow:
    """One row. `generation` tells how many commits before `revision` the tree lies that has all tests."""

    instance_id: str
    repository: str
    revision: str
    generation: int
    problem_statement: str
    text: str
    patch: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    install_commands: tuple[str, ...]

    @classmethod
    def from_row(cls, row: Row) -> SweRow:
        """Read a row of SWE-smith-oracle, or of SWE-smith itself.

        SWE-smith's own rows have no `base_commit`: the task is the branch named after the instance, whose last commit took
        the failing tests away. They are in the commit before it.

        Raises:
            DatasetError: a column is missing or malformed; the message names the row.
        """
        name = row.get("instance_id") or "a row without instance_id"
        missing = missing_columns(row, [column for column in _REQUIRED_COLUMNS if column != "PASS_TO_PASS"])
        if not row.get("base_commit") and not row.get("image_name"):
            missing.append("base_commit")
        if missing:
            raise DatasetError(f"{name}: column {', '.join(missing)} is missing")
        upstream = not row.get("base_commit")
        return cls(
            instance_id=str(row["instance_id"]),
            repository=str(row["repo"]),
            revision=str(row["instance_id"] if upstream else row["base_commit"]),
            generation=1 if upstream else 0,
            problem_statement=str(row["problem_statement"]),
            text=str(row.get("text") or ""),
            patch=str(row["patch"]),
            fail_to_pass=_strings(row, "FAIL_TO_PASS"),
            pass_to_pass=_strings(row, "PASS_TO_PASS"),
            install_commands=_strings(row, "install_commands") if "install_commands" in row else ("pip install -e .",),
        )

    @property
    def is_python(self) -> bool:
        """Whether every test is a pytest node id of a Python file."""
        return all(".py::" in node_id for node_id in (*self.fail_to_pass, *self.pass_to_pass))


def _strings(row: Row, column: str) -> tuple[str, ...]:
    value = row.get(column) or []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as reason:
            raise DatasetError(f"{row['instance_id']}: column {column} is neither a list nor JSON of one") from reason
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise DatasetError(f"{row['instance_id']}: column {column} is not a list of texts")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SweTask(AgentTask):
    """A row with what it is worked on and graded in; the two environments are the same unless the row hides its tests."""

    row: SweRow
    agent_environment: PythonEnvironment
    grading_environment: PythonEnvironment
    tests: tuple[str, ...]
    """The node ids that must pass."""


class SweSmithEnv(OrderedEnv):
    """Repair repositories; rewarded by tests in a clean workspace."""

    name = "swe_smith"
    env_config_cls: ClassVar[type[AgentEnvConfig]] = SweSmithConfig
    config: SweSmithConfig

    async def setup_agent_env(self) -> None:
        """Read the task set and put it in order.

        Raises:
            DatasetError: there is no usable row.
        """
        cache = self.config.cache_path
        task_set = await TaskSet.load(
            self.config.dataset_name, self.config.dataset_split, cache, built_in={"demo": materialise}
        )
        tasks = self._read_rows(task_set.rows)
        seed = self.config.seed if self.config.shuffle else None
        self.order = TaskOrder(tasks, seed=seed, most=self.config.max_items)
        self._wheels = tuple(sorted((task_set.folder / "wheels").glob("*.whl"))) if task_set.folder else ()
        self._repositories = RepositoryCache(
            cache / "repositories", self._repository_url(task_set.folder), self.config.install_timeout_s
        )

    def _read_rows(self, rows: list[Row]) -> list[SweRow]:
        tasks = []
        for row in rows:
            try:
                task = SweRow.from_row(row)
            except DatasetError as reason:
                self.summary.skipped_rows.append(str(reason))
                continue
            if not self._tests(task):
                self.summary.skipped_rows.append(f"{task.instance_id}: there is no test that it must pass")
            elif task.is_python or not self.config.python_only:
                tasks.append(task)
        if not tasks:
            why = f": {self.summary.skipped_rows[0]}" if self.summary.skipped_rows else ""
            raise DatasetError(f"dataset_name: {self.config.dataset_name!r} has no usable row{why}")
        return tasks

    def _repository_url(self, folder: Path | None) -> str:
        if self.config.repo_base_url:
            return self.config.repo_base_url
        if folder is not None and (folder / "repositories").is_dir():
            return (folder / "repositories").resolve().as_uri()
        return "https://github.com"

    def item_name(self, item: SweRow) -> str:
        """The instance id."""
        return item.instance_id

    async def build_task(self, item: SweRow) -> SweTask:
        """The problem statement as prompt, the repository and its environment as layer, the patch as reference."""
        agent_environment = await self._environment(item, 0)
        statement = item.problem_statement
        if self.config.prompt_mode == "problem_statement+text" and item.text:
            statement = f"{statement}\n\n{item.text}"
        return SweTask(
            prompt=[
                {"role": "system", "content": self.config.system_prompt or SYSTEM_PROMPT},
                {"role": "user", "content": statement},
            ],
            layer=agent_environment.layer(self.backend),
            reference=_reference(item),
            row=item,
            agent_environment=agent_environment,
            grading_environment=await self._environment(item, item.generation) if item.generation else agent_environment,
            tests=self._tests(item),
        )

    async def _environment(self, row: SweRow, generation: int) -> PythonEnvironment:
        snapshot = await self._repositories.snapshot(row.repository, row.revision, generation=generation)
        return PythonEnvironment(snapshot, row.install_commands, self._wheels, self.config.install_timeout_s)

    async def setup_trajectory_workspace(self, task: SweTask, workspace: Workspace) -> None:
        """Start tools in the repository, with its virtual environment activated."""
        workspace.cwd = REPOSITORY
        path = (await workspace.run('printf %s "$PATH"')).output
        workspace.env = {"PATH": f"{VIRTUAL_ENVIRONMENT}/bin:{path}", "VIRTUAL_ENV": VIRTUAL_ENVIRONMENT}

    async def validate_task(self, task: SweTask, workspace: Workspace) -> None:
        """A task whose tests pass without a fix would reward anything.

        Raises:
            EnvironmentBuildError: it is such a task.
        """
        await workspace.reset_for_grading(task.grading_environment.layer(self.backend))
        run = await run_tests(workspace, task.tests, self.config.test_timeout_s)
        if run.problem is None and not run.failures(task.row.fail_to_pass):
            raise EnvironmentBuildError("its tests pass without a fix")

    async def verify_and_score_trajectory(self, task: SweTask, episode: Episode, workspace: Workspace) -> Score:
        """1 if every named test passes in a clean workspace with the agent's change to the source, else 0."""
        details: dict[str, Any] = {"instance_id": task.row.instance_id}
        if episode.tool_counts.attempted == 0:
            return Score(0.0, "no tool was called", details)
        try:
            patch = await capture_patch(workspace, task.agent_environment.snapshot)
            details["patch"] = patch.decode("utf-8", errors="replace")[:_SHOWN_PATCH_CHARS]
            if not patch:
                return Score(0.0, "nothing was changed", details)
            await workspace.reset_for_grading(task.grading_environment.layer(self.backend))
            files, modules = await list_files(workspace), await installed_modules(workspace)
            applied = await apply_patch(workspace, patch, Protection.of_task(task.tests, task.row.patch, files, modules))
        except PatchError as reason:
            return Score(0.0, str(reason), details)
        details["left_out"] = applied.left_out
        if not applied.changed:
            return Score(0.0, "only protected paths were changed", details)
        return await self._score_by_tests(task, workspace, details)

    async def _score_by_tests(self, task: SweTask, workspace: Workspace, details: dict[str, Any]) -> Score:
        run = await run_tests(workspace, task.tests, self.config.test_timeout_s)
        if run.problem is not None:
            return Score(0.0, run.problem, details)
        failures = run.failures(task.tests)
        details["test_seconds"] = run.duration_s
        details["failed_tests"] = {node_id: run.outcomes.get(node_id, "missing") for node_id in failures[:_SHOWN_FAILURES]}
        if failures:
            return Score(0.0, f"{len(failures)} of {len(task.tests)} tests did not pass", details)
        return Score(1.0, f"all {len(task.tests)} tests passed", details)

    def _tests(self, row: SweRow) -> tuple[str, ...]:
        required = row.fail_to_pass if self.config.score_include_fail_to_pass else ()
        return (*required, *row.pass_to_pass)


def _reference(item: SweRow) -> list[ToolCall]:
    """Put the patch into a file and apply it; a bug's patch, as SWE-smith has it, is applied in reverse."""
    path = f"{WORKSPACE}/solution.patch"
    apply = f"git apply {shlex.quote(path)}"
    return [
        ToolCall("solution-1", "write_file", {"path": path, "content": item.patch}),
        ToolCall("solution-2", "terminal", {"command": f"{apply} || {apply} --reverse"}),
    ]


if __name__ == "__main__":
    SweSmithEnv.cli()
