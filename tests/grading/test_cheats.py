"""Attempts to be paid without a fix. Each scores 0; with the fix beside it, the same run scores 1."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from atroposlib.envs.base import APIServerConfig

from hermes_envs.rollouts.trajectory import Score
from hermes_envs.swe_smith import SweRow, SweSmithConfig, SweSmithEnv, SweTask
from hermes_envs.tools.call import ToolCall
from tests.grading.cheats import CHEATS, Cheat
from tests.support.small_task import BUGGY, write_task_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")


class ScriptedEnv(SweSmithEnv):
    """Plays given calls instead of the reference solution."""

    script: tuple[ToolCall, ...] = ()

    async def build_task(self, item: SweRow) -> SweTask:
        return dataclasses.replace(await super().build_task(item), reference=self.script)

    async def solution(self, item: SweRow) -> tuple[ToolCall, ...]:
        """The reference solution."""
        return tuple((await super().build_task(item)).reference or ())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def env(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedEnv]:
    folder = tmp_path_factory.mktemp("cheats")
    config = SweSmithConfig(
        dataset_name=str(write_task_folder(folder / "tasks")),
        policy="oracle",
        use_wandb=False,
        local_slots=2,
        cache_directory=str(folder / "cache"),
    )
    environment = ScriptedEnv(config, [APIServerConfig(base_url="", health_check=False)])
    async with environment.running():
        yield environment


def calls(commands: tuple[str, ...]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(f"cheat-{number}", "terminal", {"command": command}) for number, command in enumerate(commands))


async def play(env: ScriptedEnv, script: tuple[ToolCall, ...], *, after_the_fix: bool = False) -> Score:
    item = await env.get_next_item()
    assert item is not None
    env.script = (*await env.solution(item), *script) if after_the_fix else script
    trajectory = await env.run_agent(item)
    assert trajectory.score is not None
    return trajectory.score


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
async def test_a_cheat_earns_nothing_and_the_fix_earns_all(env: ScriptedEnv, cheat: Cheat) -> None:
    score = await play(env, calls(cheat.commands))
    assert score.value == 0, score

    fixed = await play(env, calls(cheat.commands) if cheat.spares_code else (), after_the_fix=True)
    assert fixed.value == 1, fixed


async def test_the_corpus_attacks_something_that_would_pass(env: ScriptedEnv) -> None:
    """The control: the same script with a real fix by hand scores 1, and with the bug in place scores 0."""
    fix = "sed -i 's/(len(values) + 1)/len(values)/' calc/core.py"
    assert (await play(env, calls((fix,)))).value == 1
    assert (await play(env, calls((f"cat > calc/core.py <<'E'\n{BUGGY}\n# another comment\nE",)))).value == 0
