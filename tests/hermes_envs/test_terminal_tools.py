"""An agent that works in a stateful shell and in a terminal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig

from hermes_envs.env import AgentEnv, AgentEnvConfig, AgentTask
from hermes_envs.errors import ConfigError
from hermes_envs.rollouts.trajectory import Episode, Score
from hermes_envs.screen.decoder import AsciinemaStreamDecoder
from hermes_envs.tools.call import ToolCall
from hermes_envs.workspace import Workspace
from sandbox_image.protocol import RECORDING_PATH

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("terminal_stateful", {"command": "mkdir project && cd project && export WHO=agent"}),
    ("terminal_stateful", {"command": "(sleep 0.1; echo served) & pwd; echo $WHO"}),
    ("tmux", {"action": "start", "pane_width": 60.0, "pane_height": 10}),
    ("tmux", {"action": "send_keys", "keys": ["cat > project/note", "Enter"]}),
    ("tmux", {"action": "send_keys", "keys": ["written by hand, 漢", "Enter", "C-d"], "block": True}),
    ("tmux", {"action": "send_keys", "keys": ["sleep 9", "Enter"], "block": True, "max_wait_s": 0.2}),
    ("tmux", {"action": "send_keys", "keys": "C-c", "block": True}),
    ("tmux", {"action": "send_keys"}),
    ("terminal_stateful", {"command": "cat note; (exit 3)"}),
]


class TerminalEnv(AgentEnv):
    """Write a note."""

    name = "terminals"
    recording = ""

    def __init__(self, config: AgentEnvConfig) -> None:
        super().__init__(config, [APIServerConfig(base_url="")])

    async def get_next_item(self) -> str | None:
        return None

    async def build_task(self, item: str) -> AgentTask:
        calls = [ToolCall(f"c{number}", name, arguments) for number, (name, arguments) in enumerate(CALLS)]
        return AgentTask(prompt=[{"role": "user", "content": "Write a note."}], reference=calls)

    async def verify_and_score_trajectory(self, task: AgentTask, episode: Episode, workspace: Workspace) -> Score:
        artifact = await workspace.backend.read_artifact(workspace.slot, RECORDING_PATH)
        self.recording = artifact.content
        return Score(float(await workspace.read("project/note") == "written by hand, 漢\n".encode()), "the note")


def config(tmp_path: Path, **options: Any) -> AgentEnvConfig:
    return AgentEnvConfig(
        policy="oracle", local_slots=1, enabled_toolsets=["sandbox"], include_messages=True, use_wandb=False, **options
    )


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
async def test_an_agent_in_a_terminal(tmp_path: Path) -> None:
    environment = TerminalEnv(config(tmp_path))
    async with environment.running():
        trajectory = await environment.run_agent("task")
    assert trajectory.score is not None
    assert trajectory.score.value == 1.0
    answers = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert answers[0] == "[no output]"
    assert answers[1] == "/workspace/project\nagent"
    assert answers[2] == "/workspace$"
    assert answers[4].splitlines()[-2:] == ["written by hand, 漢", "/workspace$"]
    assert answers[5].endswith("sleep 9\n[the shell does not wait for a command yet]")
    assert answers[6].endswith("^C\n/workspace$")
    assert answers[7] == "[`send_keys` needs `keys`]"
    assert answers[8] == "written by hand, 漢\n[exit status 3]\n[meanwhile from background jobs]\nserved"
    assert AsciinemaStreamDecoder.of(environment.recording).text() == answers[6]


def test_stateful_tools_without_isolation_are_asked_for(tmp_path: Path) -> None:
    unsafe = {"local_isolation": "none", "require_sandbox": False}
    with pytest.raises(ConfigError, match=r"require_stateful_sandbox: terminal_stateful, tmux would run without isolation"):
        TerminalEnv(config(tmp_path, **unsafe))
    TerminalEnv(config(tmp_path, **unsafe, require_stateful_sandbox=False))
    TerminalEnv(config(tmp_path, **unsafe, disabled_toolsets=["terminal_stateful", "tmux"]))
