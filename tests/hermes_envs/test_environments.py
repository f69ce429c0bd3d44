"""Environments by name, from this package and from others."""

from __future__ import annotations

import sys

import pytest

from hermes_envs import environments
from hermes_envs.environments import ENVIRONMENTS
from hermes_envs.errors import ConfigError
from hermes_envs.smoke import SmokeEnv
from tests.support.counting_env import CountingEnv

COUNTING = "tests.support.counting_env:CountingEnv"


def end_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """What `python -m hermes_envs.environments` ends with."""
    monkeypatch.setattr(sys, "argv", ["environments", *arguments])
    with pytest.raises(SystemExit) as ended:
        environments.main()
    return ended.value.code


def test_names() -> None:
    assert ENVIRONMENTS.load("smoke") is SmokeEnv
    assert ENVIRONMENTS.load(COUNTING).__name__ == CountingEnv.__name__
    with pytest.raises(ConfigError, match=r"^environment: 'maze' is not available.*: gsm8k_agent, simple_qa, smoke"):
        ENVIRONMENTS.load("maze")
    with pytest.raises(ConfigError, match=r"'backends.local:LocalBackend' is no subclass of AgentEnv"):
        ENVIRONMENTS.load("backends.local:LocalBackend")


@pytest.mark.parametrize(("name", "flag"), [("smoke", "--env.num_eval_tasks"), (COUNTING, "--env.slow_item")])
def test_the_command_line_is_that_of_the_environment(
    name: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(monkeypatch, name, "process", "--help") == 0
    assert flag in capsys.readouterr().out


def test_a_name_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        assert end_of(monkeypatch, *arguments) == 2
        assert "no environment is named; there are gsm8k_agent, simple_qa, smoke, swe_smith" in capsys.readouterr().err
    assert str(end_of(monkeypatch, "maze", "process")).startswith("error: environment: 'maze' is not available")
