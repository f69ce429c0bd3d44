"""The file that a trainer and `serve` share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hermes_envs.test_command_line import CommandLine, error_of


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line where TINKER_CONFIG names a file that has a mistake in it."""
    (tmp_path / "shared.yaml").write_text("env:\n  group_sise: 4\n")
    monkeypatch.setenv("TINKER_CONFIG", "shared.yaml")
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_serve_reads_the_trainers_file(command_line: CommandLine) -> None:
    assert error_of(command_line.run("serve")) == "config: shared.yaml: unknown key env.group_sise"


@pytest.mark.parametrize("flags", [("--config", "other.yaml"), ("--config=other.yaml",)])
def test_a_file_that_is_given_comes_before_it(command_line: CommandLine, flags: tuple[str, ...]) -> None:
    (command_line.directory / "other.yaml").write_text("env:\n  policy: oracle\n  use_wandb: false\n")
    assert error_of(command_line.run("serve", *flags)).startswith("env.policy: 'oracle' has no exact tokens")


def test_only_serve_reads_it(command_line: CommandLine) -> None:
    assert "shared.yaml" not in error_of(command_line.run("process", "--env.use_wandb=false", "--env.policy=tokens"))


def test_one_that_is_not_there_is_named(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_CONFIG", "missing.yaml")
    assert "cannot read missing.yaml" in error_of(command_line.run("serve"))
