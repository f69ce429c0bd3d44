"""The file that trainer and environment share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hermes_envs.errors import ConfigError
from hermes_envs.train.options import TinkerService, TrainingConfig
from hermes_envs.train.run import EnvironmentCommand, run

SECTIONS: dict[str, Any] = {
    "env": {"tokenizer_name": "some/model", "group_size": 4, "batch_size": 8, "total_steps": 3, "agent_max_steps": 5},
    "openai": [{"base_url": "http://localhost:8001/v1", "model_name": "some/model"}],
    "tinker": {"lora_rank": 8},
}


def load(folder: Path, sections: Any, **overrides: dict[str, Any]) -> TrainingConfig:
    path = folder / "some.yaml"
    path.write_text(sections if isinstance(sections, str) else yaml.safe_dump(sections))
    return TrainingConfig.load(path, overrides)


def test_the_known_names_have_the_known_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, SECTIONS | {"tinker": {"wandb_run_suffix": "a"}})
    assert config.base_model == "some/model"
    assert (
        config.tinker.model_dump()
        | {
            "lora_rank": 32,
            "learning_rate": 4e-5,
            "max_token_trainer_length": 2048,
            "checkpoint_dir": "./temp/",
            "save_checkpoint_interval": 0,
            "wandb_project": "atropos-tinker",
            "wandb_group": None,
            "wandb_run_name": "atropos-tinker-run",
            "inference_port": 8001,
        }
        == config.tinker.model_dump()
    )
    assert config.tinker.run_folder == Path("temp/atropos-tinker-run-a")


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, SECTIONS, env={"total_steps": 9}, tinker={"lora_rank": 4, "base_model": "other"})
    assert (config.env.total_steps, config.tinker.lora_rank, config.base_model) == (9, 4, "other")


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({name: value for name, value in SECTIONS.items() if name != "tinker"}, "the section tinker: is missing"),
        ({name: value for name, value in SECTIONS.items() if name != "openai"}, "the section openai: is missing"),
        (SECTIONS | {"trainer": {}}, "unknown section trainer"),
        (SECTIONS | {"tinker": {"lora_rnk": 8}}, "tinker.lora_rnk: there is no such option"),
        (SECTIONS | {"tinker": {"learning_rate": -1}}, "tinker.learning_rate"),
        (SECTIONS | {"tinker": ["lora_rank"]}, "tinker is not a mapping"),
        (SECTIONS | {"env": {"group_size": 4, "batch_size": 8, "total_steps": 3}}, "env.tokenizer_name"),
        (SECTIONS | {"env": SECTIONS["env"] | {"batch_size": 10}}, "env.batch_size: 10 is no multiple of env.group_size 4"),
        (
            SECTIONS | {"env": SECTIONS["env"] | {"rollout_server_url": "localhost:8000"}},
            "env.rollout_server_url: 'localhost:8000'",
        ),
        (SECTIONS | {"env": SECTIONS["env"] | {"rollout_server_url": "http://localhost:80a0"}}, "env.rollout_server_url"),
        ("env: [", "is not YAML"),
        ("text", "the file is not a mapping"),
    ],
)
def test_what_cannot_work_is_said_with_the_file_and_the_key(tmp_path: Path, sections: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, sections)
    assert problem in str(raised.value)
    assert str(tmp_path / "some.yaml") in str(raised.value)


def test_an_environment_that_would_ask_somebody_else_is_an_error(tmp_path: Path) -> None:
    load(tmp_path, SECTIONS).check_endpoints()
    with pytest.raises(ConfigError, match=r"openai.base_url: 'http://localhost:8001/v1' is not this trainer, .* port 9000"):
        load(tmp_path, SECTIONS, tinker={"inference_port": 9000}).check_endpoints()


@pytest.mark.parametrize(
    "url", ["http://localhost:80a1/v1", "http://gpu7:8001/v1", "https://localhost:8001/v1", "localhost:8001", ""]
)
def test_an_endpoint_that_is_no_address_of_this_trainer_is_an_error(tmp_path: Path, url: str) -> None:
    sections = SECTIONS | {"openai": [{"base_url": url}]}
    with pytest.raises(ConfigError, match=r"openai.base_url: .* is not this trainer"):
        load(tmp_path, sections).check_endpoints()


@pytest.mark.parametrize("url", ["http://127.0.0.1:8001/v1", "http://localhost:8001", "http://GPU7:8001/v1"])
def test_each_name_of_this_trainer_is_good(tmp_path: Path, url: str) -> None:
    load(tmp_path, SECTIONS | {"openai": [{"base_url": url}]}, tinker={"inference_host": "gpu7"}).check_endpoints()


async def test_others_may_not_ask_without_a_key(tmp_path: Path) -> None:
    config = load(tmp_path, SECTIONS, tinker={"inference_host": "0.0.0.0", "checkpoint_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"tinker.inference_host: '0.0.0.0' can be reached by others; give openai.api_key"):
        await run(config, TinkerService(), None)


def test_variables_say_where_the_service_is() -> None:
    given = {"TINKER_BASE_URL": "http://gpu7", "TINKER_API_KEY": "s3cret", "TINKER_TELEMETRY": "0"}
    service = TinkerService.from_variables(given)
    assert service.base_url == "http://gpu7"
    assert service.api_key is not None
    assert service.api_key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(service)
    assert TinkerService.from_variables({"TINKER_BASE_URL": "", "BASE_URL": "http://gpu8"}) == TinkerService()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        TrainingConfig.load(tmp_path / "none.yaml", {})


@pytest.mark.parametrize("name", ["tests.train.nothing", "nowhere.at_all", "nowhere.at_all:Environment"])
def test_a_module_that_there_is_not(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no module"):
        EnvironmentCommand.of(name, Path("some.yaml"), ())


def test_an_environment_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"'nothing_like_it' is not available.* available: gsm8k_agent, simple_qa, smoke"):
        EnvironmentCommand.of("nothing_like_it", Path("some.yaml"), ())


@pytest.mark.parametrize("name", ["smoke", "tests.support.counting_env:CountingEnv"])
def test_an_environment_goes_by_its_name(name: str) -> None:
    command = EnvironmentCommand.of(name, Path("some.yaml"), ("--env.total_steps", "3"))
    assert command.module == "hermes_envs.environments"
    assert command.arguments == (name, "serve", "--config", "some.yaml", "--env.policy", "tokens", "--env.total_steps", "3")


def test_a_module_is_run_as_it_is() -> None:
    command = EnvironmentCommand.of("tests.support.counting_env", Path("some.yaml"), ())
    assert command.module == "tests.support.counting_env"
    assert command.arguments == ("serve", "--config", "some.yaml", "--env.policy", "tokens")
