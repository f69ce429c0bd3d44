"""The real mini-swe-agent, with a scripted model, in our slots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from backends import BackendOptions, SlotLostError
from hermes_envs.agent_programs.pool import TerminalPool

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes environments as mini-swe-agent does from its configuration."""
    from minisweagent.environments import get_environment

    options = {"local_slots": 2, "local_data_dir": str(tmp_path / "data")}
    (tmp_path / "data").mkdir()

    def make(**more: Any) -> Any:
        name = "hermes_envs.agent_programs.mini_swe_agent.SlotEnvironment"
        return get_environment({"environment_class": name, **options, **more})

    yield make
    TerminalPool.shared(BackendOptions.model_validate(options)).close()


def agent_with(environment: Any, *commands: str, **options: Any) -> Any:
    """mini-swe-agent's default agent with its own prompts and a model that gives these commands."""
    import yaml
    from minisweagent import package_dir
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.models.test_models import DeterministicModel, make_output

    configuration = yaml.safe_load((package_dir / "config/default.yaml").read_text())["agent"]
    model = DeterministicModel(outputs=[make_output("", [{"command": command}]) for command in commands], cost_per_call=0)
    return DefaultAgent(model, environment, **{**configuration, **options, "cost_limit": 0})


def test_the_default_agent_repairs_a_program_in_a_slot(make: Make, tmp_path: Path) -> None:
    environment = make()
    agent = agent_with(
        environment,
        "printf 'print(sum([1, 2]) / 3)\\n' > mean.py && python3 mean.py",
        "python3 missing.py",
        "sed -i 's/3/2/' mean.py && python3 mean.py",
        "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat mean.py",
        output_path=tmp_path / "trajectory.json",
    )
    assert agent.run("The mean is wrong.") == {"exit_status": "Submitted", "submission": "print(sum([1, 2]) / 2)\n"}
    observations = [message["extra"] for message in agent.messages if "raw_output" in message.get("extra", {})]
    assert [(seen["raw_output"], seen["returncode"]) for seen in observations[::2]] == [("1.0\n", 0), ("1.5\n", 0)]
    assert observations[1]["returncode"] == 2
    assert "missing.py" in observations[1]["raw_output"]
    # The prompt names the machine that commands run on.
    assert "Linux" in agent.messages[1]["content"]
    written = json.loads((tmp_path / "trajectory.json").read_text())
    assert written["info"]["exit_status"] == "Submitted"
    assert written["info"]["config"]["environment_type"] == "hermes_envs.agent_programs.mini_swe_agent.SlotEnvironment"
    assert written["info"]["config"]["environment"]["local_slots"] == 2


def test_the_protocol_of_an_output(make: Make) -> None:
    environment = make(env={"COLOUR": "blue"}, cwd="/usr", timeout=0.5)
    assert environment.execute({"command": "pwd; echo $COLOUR; exit 4"}) == {
        "output": "/usr\nblue\n",
        "returncode": 4,
        "exception_info": "",
    }
    late = environment.execute({"command": "echo begun; sleep 60"})
    assert (late["output"], late["returncode"]) == ("begun\n", -1)
    assert late["exception_info"] == "An error occurred while executing the command: timed out after 0.5 s"
    assert environment.execute({"command": "sleep 0.8"}, timeout=20)["returncode"] == 0
    assert environment.execute({"command": "\0"})["returncode"] == -1
    assert environment.execute({}) == {"output": "", "returncode": 0, "exception_info": ""}
    # Not handed in: the command failed, or the word is not the first line.
    word = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
    assert environment.execute({"command": f"echo {word}; false"})["returncode"] == 1
    assert environment.execute({"command": f"echo x; echo {word}"})["returncode"] == 0
    environment.cleanup()
    with pytest.raises(SlotLostError):
        environment.execute({"command": "true"})


def test_a_slot_that_fails_ends_the_run_and_is_no_observation(make: Make) -> None:
    environment = make()
    agent = agent_with(environment, "echo lost")
    # What the prompts want to know, while the slot is there.
    environment.get_template_vars()
    environment.cleanup()
    with pytest.raises(SlotLostError):
        agent.run("Anything.")
    assert agent.messages[-1]["extra"]["exit_status"] == "SlotLostError"


def test_environments_share_a_backend_and_a_task_shares_a_slot(make: Make, tmp_path: Path) -> None:
    first, second, third = make(task_id="task"), make(task_id="task"), make()
    first.execute({"command": "echo kept > file"})
    assert second.execute({"command": "cat file"})["output"] == "kept\n"
    assert third.execute({"command": "ls"})["output"] == ""
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_unknown_options_are_errors(make: Make) -> None:
    with pytest.raises(pydantic.ValidationError, match="image"):
        make(image="python:3.11")
