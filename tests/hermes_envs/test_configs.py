"""The YAML files that ship: each is good for `process`, for `serve` and for the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from atroposlib.envs.base import APIServerConfig

from hermes_envs.env import AgentEnv
from hermes_envs.environments import ENVIRONMENTS
from hermes_envs.errors import ConfigError
from hermes_envs.serving.serving import check_options
from hermes_envs.train.options import TrainingConfig

CONFIGS = Path(__file__).parent.parent.parent / "configs"
ENVIRONMENT = {
    "gsm8k_agent": "gsm8k_agent",
    "simple_qa": "simple_qa",
    "smoke": "smoke",
    "swe_smith": "swe_smith",
    "swe_smith_demo": "swe_smith",
}
SMALL = {
    "gsm8k_agent": ("--env.max_items=2", "--env.local_slots=2"),
    "simple_qa": (),
    "smoke": (),
    "swe_smith": ("--env.dataset_name=demo", "--env.max_items=1", "--env.local_slots=1"),
    "swe_smith_demo": ("--env.max_items=1", "--env.local_slots=1"),
}
"""What makes a short run of a configuration, without the network."""

pytestmark = pytest.mark.filterwarnings("ignore:You are using a local Base URL:UserWarning")


def environment_class(name: str) -> type[AgentEnv]:
    return ENVIRONMENTS.load(ENVIRONMENT[name])


def sections(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert isinstance(content, dict)
    return content


class CommandLine:
    """Runs an environment's command line in a directory of its own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.chdir(directory)

    def run(self, name: str, *arguments: str) -> tuple[object, str]:
        """The exit status, and what was said about errors."""
        self._monkeypatch.setattr("sys.argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            environment_class(name).cli()
        return ended.value.code, self._capsys.readouterr().err

    def error(self, name: str, *arguments: str) -> str:
        """The one line that says what is wrong."""
        status, said = self.run(name, *arguments)
        [line] = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 1
        assert "Traceback" not in said
        return line


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_every_file_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(ENVIRONMENT) == set(SMALL)


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_process_with_the_reference_solution(command_line: CommandLine, tmp_path: Path, name: str) -> None:
    flags = ("--env.policy=oracle", "--env.group_size=1", "--env.use_wandb=false", "--env.total_steps=2")
    where = ("--env.data_path_to_save_groups=out.jsonl", f"--env.cache_directory={tmp_path / 'cache'}")
    status, said = command_line.run(name, "process", f"--config={CONFIGS / name}.yaml", *flags, *where, *SMALL[name])
    assert status == 0, said
    groups = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {score for group in groups for score in group["scores"]} == {1.0}


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_what_a_trainer_and_its_environment_must_agree_on(name: str) -> None:
    content = sections(name)
    assert set(content) == {"env", "openai", "tinker"}
    env = environment_class(name).env_config_cls.model_validate({**content["env"], "policy": "tokens"})
    check_options(env)
    [server] = content["openai"]
    assert APIServerConfig.model_validate(server).server_type == "sglang"
    assert server["health_check"] is False
    training = TrainingConfig.load(CONFIGS / f"{name}.yaml", {})
    assert training.base_model == env.tokenizer_name == server["tokenizer_name"] == server["model_name"]
    assert training.tinker.max_token_trainer_length == env.max_token_length
    assert env.agent_temperature == 1.0
    assert server["base_url"] == f"http://localhost:{training.tinker.inference_port}/v1"


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_there_is_a_slot_for_each_rollout_of_serve(name: str) -> None:
    """Else rollouts wait for slots that others of their groups hold, and run into `acquire_timeout_s`."""
    env = sections(name)["env"]
    if "local_slots" in env:
        config = environment_class(name).env_config_cls.model_validate(env)
        workers = config.max_num_workers if config.max_num_workers > 0 else config.max_num_workers_per_node
        assert workers * config.group_size <= config.local_slots


@pytest.mark.parametrize("name", ["simple_qa", "smoke"])
def test_tests_of_the_wiring_make_steps_even_if_nobody_fails(name: str) -> None:
    assert environment_class(name).env_config_cls.model_validate(sections(name)["env"]).ensure_scores_are_not_same is False


@pytest.mark.parametrize("name", ["smoke", "swe_smith_demo"])
def test_files_for_a_first_try_need_no_model(name: str) -> None:
    assert sections(name)["env"]["policy"] == "oracle"


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
@pytest.mark.parametrize("section", ["env", "openai"])
def test_an_unknown_key_is_one_line(command_line: CommandLine, tmp_path: Path, name: str, section: str) -> None:
    content = sections(name)
    (content["env"] if section == "env" else content["openai"][0])["polcy"] = "oracle"
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(content))
    line = command_line.error(name, "process", "--config", "changed.yaml", "--env.policy=oracle")
    assert line == f"error: config: changed.yaml: unknown key {section}.polcy"


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_a_missing_section_is_one_line(command_line: CommandLine, tmp_path: Path, name: str) -> None:
    content = sections(name)
    del content["openai"]
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(content))
    line = command_line.error(name, "serve", "--config", "changed.yaml", "--env.policy=tokens")
    assert line.startswith("error: openai.base_url: no inference endpoint is configured")
    for section in ("env", "openai", "tinker"):
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump({**sections(name), section: None}))
        with pytest.raises(ConfigError, match=f"the section {section}: is missing"):
            TrainingConfig.load(tmp_path / "changed.yaml", {})
