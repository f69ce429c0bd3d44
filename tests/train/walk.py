"""A small world in the sandbox: walk along a corridor with bends, told after each step where one is.

python -m tests.train.walk serve --config FILE
"""

from __future__ import annotations

import itertools
from typing import ClassVar

from backends.errors import SandboxError
from hermes_envs.env import AgentEnv, AgentEnvConfig, AgentTask
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.workspace import Workspace

DIRECTIONS = ("north", "east", "south", "west")
CORRIDOR = ("0 0", "0 1", "1 1", "1 2", "2 2")
"""The fields that can be walked on, `x y`: north and east by turns. At the end of it is the flag."""
EVALUATED = 4
PROMPT = "Walk along the corridor to the flag."

SCRIPT = f"""\
read x y < position
case $1 in
north) y=$((y + 1)) ;;
east) x=$((x + 1)) ;;
south) y=$((y - 1)) ;;
west) x=$((x - 1)) ;;
esac
case "$x $y" in
{" | ".join(f'"{field}"' for field in CORRIDOR)}) echo "$x $y" > position ;;
esac
cat position
"""


def command(direction: str) -> str:
    """What the model has to run to take a step."""
    return f"sh walk {direction}"


class WalkEnv(AgentEnv):
    """Walk to the flag; a step into a wall leads nowhere.

    Half of the reward is the share of the corridor that was walked, the other half the share of as many steps that were taken
    at all, wherever they led.
    """

    name = "walk"
    env_config_cls: ClassVar[type[AgentEnvConfig]] = AgentEnvConfig

    async def setup_agent_env(self) -> None:
        self._numbers = itertools.count(1)

    async def get_next_item(self) -> int:
        return next(self._numbers)

    def item_name(self, item: int) -> str:
        return f"walk-{item}"

    async def build_task(self, item: int) -> AgentTask:
        return AgentTask(prompt=[{"role": "user", "content": PROMPT}])

    async def setup_trajectory_workspace(self, task: AgentTask, workspace: Workspace) -> None:
        for path, content in (("walk", SCRIPT), ("position", CORRIDOR[0])):
            written = await workspace.write(path, content.encode())
            if not written.success:
                raise SandboxError(f"{path} cannot be written: {written.error}")

    async def verify_and_score_trajectory(self, task: AgentTask, episode: Episode, workspace: Workspace) -> Score:
        """Judge by the position that the sandbox has, whatever the model has said."""
        position = (await workspace.read("position")).decode().strip()
        if position not in CORRIDOR:
            return Score(0.0, f"not in the corridor: {position[:20]!r}")
        way = len(CORRIDOR) - 1
        walked = CORRIDOR.index(position) / way
        steps = min(episode.tool_counts.executed_ok, way) / way
        return Score((walked + steps) / 2, f"{episode.tool_counts.executed_ok} steps, at {position}")

    def held_out_items(self) -> list[int]:
        """A few more walks."""
        return [next(self._numbers) for _ in range(EVALUATED)]


if __name__ == "__main__":
    WalkEnv.cli()
