from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from hermes_envs.env import AgentEnv
from hermes_envs.errors import ConfigError
from hermes_envs.tools.tool import Tool
from hermes_envs.tools.toolsets import Toolsets


def test_default_has_terminal_and_files() -> None:
    assert list(Toolsets().resolve(["default"])) == ["terminal", "read_file", "write_file"]


def test_the_stateful_shell_has_two_names() -> None:
    assert list(Toolsets().resolve(["terminal_stateful", "bash_stateful"])) == ["terminal_stateful", "bash_stateful"]
    assert "terminal_stateful" in Toolsets().resolve(["sandbox"])
    assert "terminal_stateful" in Toolsets().resolve(["full"])


def test_disabled_toolsets_take_away_what_others_include() -> None:
    assert list(Toolsets().resolve(["default"], ["filesystem"])) == ["terminal"]


@pytest.mark.parametrize("option", ["enabled_toolsets", "disabled_toolsets"])
def test_unknown_name_names_the_option(option: str) -> None:
    names = {"enabled_toolsets": ["default"], "disabled_toolsets": []} | {option: ["browser"]}
    with pytest.raises(ConfigError, match=f"{option}: unknown toolset 'browser'"):
        Toolsets().resolve(names["enabled_toolsets"], names["disabled_toolsets"])


GREET = Tool("greet", "Say hello.", {"type": "object"}, lambda workspace, arguments: ("bash", {"command": "echo hello"}))


def test_registered_toolset_with_its_own_tool() -> None:
    toolsets = Toolsets().register("social", tools=[GREET], includes=["filesystem"])
    assert list(toolsets.resolve(["social"])) == ["greet", "read_file", "write_file"]
    assert toolsets.resolve(["social"])["greet"] is GREET
    nested = toolsets.register("all", includes=["social", "bash"])
    assert list(nested.resolve(["all"])) == ["bash", "greet", "read_file", "write_file"]


def test_an_environments_toolsets_are_its_own() -> None:
    class Greeting(AgentEnv):
        toolsets = AgentEnv.toolsets.register("social", tools=[GREET])

    assert list(Greeting.toolsets.resolve(["social"])) == ["greet"]
    for others in (AgentEnv.toolsets, Toolsets()):
        assert "greet" not in others.tools
        with pytest.raises(ConfigError, match="unknown toolset 'social'"):
            others.resolve(["social"])


def test_nobody_can_change_what_all_environments_share() -> None:
    with pytest.raises(TypeError):
        AgentEnv.toolsets.members["social"] = ("bash",)  # type: ignore[index]
    with pytest.raises(TypeError):
        AgentEnv.toolsets.tools["greet"] = GREET  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        AgentEnv.toolsets.members = {}  # type: ignore[misc]
    given = {"terminal": ("terminal",)}
    toolsets = Toolsets(members=given)
    given["terminal"] = ("bash",)
    assert list(toolsets.resolve(["terminal"])) == ["terminal"]


def test_registering_a_taken_name_or_an_unknown_member_is_refused() -> None:
    with pytest.raises(ConfigError, match="exists already"):
        Toolsets().register("default")
    with pytest.raises(ConfigError, match="neither a tool nor a toolset"):
        Toolsets().register("new", includes=["nothing"])


def test_toolsets_that_include_each_other_end() -> None:
    toolsets = Toolsets(members={"one": ("two",), "two": ("one", "read_file")})
    assert list(toolsets.resolve(["one"])) == ["read_file"]
