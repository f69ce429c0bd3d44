from __future__ import annotations

import pytest

from hermes_envs.errors import ConfigError
from hermes_envs.tools.tool import BUILTIN_TOOLS, Tool
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


def test_registered_toolset_with_its_own_tool() -> None:
    toolsets = Toolsets()
    greet = Tool("greet", "Say hello.", {"type": "object"}, lambda workspace, arguments: ("bash", {"command": "echo hello"}))
    toolsets.register("social", ["greet", "filesystem"], [greet])
    assert list(toolsets.resolve(["social"])) == ["greet", "read_file", "write_file"]
    assert "greet" not in BUILTIN_TOOLS


def test_registering_a_taken_name_or_an_unknown_member_is_refused() -> None:
    with pytest.raises(ConfigError, match="exists already"):
        Toolsets().register("default", [])
    with pytest.raises(ConfigError, match="neither a tool nor a toolset"):
        Toolsets().register("new", ["nothing"])


def test_toolsets_that_include_each_other_end() -> None:
    toolsets = Toolsets()
    toolsets.register("one", ["terminal"])
    toolsets.register("two", ["one", "filesystem"])
    toolsets.members["one"] = ("two",)
    assert list(toolsets.resolve(["one"])) == ["read_file", "write_file"]
