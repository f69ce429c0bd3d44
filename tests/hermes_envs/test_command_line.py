"""What a user gets to see, from the command line on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from hermes_envs.swe_smith import SweSmithEnv
from tests.support.small_task import PASS_TO_PASS, write_task_folder


@dataclass(frozen=True)
class Done:
    """How a command line ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class CommandLine:
    """Runs an environment's command line in a directory of its own, as a process would."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.chdir(directory)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(self, *arguments: str) -> Done:
        """Run `swe_smith` with these arguments."""
        self._monkeypatch.setattr("sys.argv", ["swe_smith", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            SweSmithEnv.cli()
        output = self._capsys.readouterr()
        status = ended.value.code
        return Done(status if isinstance(status, int) else int(status is not None), output.out, output.err)

    def process(self, *, config: str | None = None, **options: object) -> Done:
        """`process` with the oracle on the small task, unless the options say otherwise."""
        defaults = {
            "dataset_name": "tasks",
            "policy": "oracle",
            "group_size": 2,
            "local_slots": 2,
            "use_wandb": "false",
            "data_path_to_save_groups": "out/groups.jsonl",
            "cache_directory": "cache",
        }
        file = [] if config is None else ["--config", config]
        return self.run("process", *file, *(f"--env.{name}={value}" for name, value in {**defaults, **options}.items()))


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def error_of(done: Done) -> str:
    """The one line that says what was wrong."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return errors[0].removeprefix("error: ")


def test_oracle_scores_one_and_the_trajectories_are_written(command_line: CommandLine, tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks", rows=3)
    done = command_line.process()
    assert done.returncode == 0, done.stderr
    for part in ("mean score", "1.000", "infrastructure errors", "seconds in grading", "group 3: small__calc."):
        assert part in done.stdout
    groups = [json.loads(line) for line in (tmp_path / "out/groups.jsonl").read_text().splitlines()]
    assert [group["scores"] for group in groups] == [[1.0, 1.0]] * 3
    assert {override["instance_id"] for group in groups for override in group["overrides"]} == {
        f"small__calc.{number}" for number in range(3)
    }
    # The oracle has no tokens, and none are made up.
    assert all(group[key] == [[], []] for group in groups for key in ("tokens", "masks", "inference_logprobs"))
    page = (tmp_path / "out/groups.html").read_text()
    assert "git apply" in page
    assert "len(values)" in page


def test_nop_scores_nothing(command_line: CommandLine, tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks")
    done = command_line.process(policy="nop")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/groups.jsonl").read_text())["scores"] == [0.0, 0.0]


def test_nop_sets_a_task_aside_that_needs_no_fix(command_line: CommandLine, tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks", FAIL_TO_PASS=PASS_TO_PASS)
    done = command_line.process(policy="nop")
    assert error_of(done) == "no trajectory was collected"
    assert "set aside: small__calc.0: its tests pass without a fix" in done.stdout


def test_without_an_endpoint_it_says_so_and_names_the_demo(command_line: CommandLine, tmp_path: Path) -> None:
    for policy in ("messages", "tokens"):
        message = error_of(command_line.process(policy=policy))
        assert "openai.base_url" in message
        assert "scripts/demo" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_pool_mode": "podman"}, "tool_pool_mode: 'podman' is not available in this version; available: local"),
        ({"tool_pool_mode": "nowhere:Backend"}, "tool_pool_mode: 'nowhere:Backend' cannot be imported"),
        ({"policy": "guess"}, "policy"),
        ({"enabled_toolsets": "browser"}, "enabled_toolsets: unknown toolset 'browser'"),
        ({"agent_max_steps": "0"}, "agent_max_steps"),
        ({"prompt_mode": "all"}, "prompt_mode"),
        ({"dataset_name": "./missing"}, "dataset_name: './missing' is no folder"),
        ({"dataset_name": "missing.jsonl"}, "cannot read missing.jsonl"),
        ({"dataset_name": "missing.parquet"}, "cannot read missing.parquet"),
        ({"dataset_name": "nobody/nothing"}, "cannot load 'nobody/nothing'"),
        ({"local_isolation": "none"}, "require_sandbox"),
    ],
)
def test_bad_options_are_one_line(command_line: CommandLine, tmp_path: Path, options: dict[str, str], words: str) -> None:
    write_task_folder(tmp_path / "tasks")
    assert words in error_of(command_line.process(**options))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read config.yaml: No such file"),
        ("env: [", "config.yaml is not YAML"),
        ("- env", "expected sections"),
        ("env:\n  polcy: oracle\n", "unknown key env.polcy"),
        ("environment:\n  policy: oracle\n", "unknown section environment"),
        ("openai:\n  - modelname: x\n", "unknown key openai.modelname"),
        ("env:\n  group_size: many\n  policy: oracle\n", "group_size"),
    ],
)
def test_bad_config_files_are_one_line(command_line: CommandLine, tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert words in error_of(command_line.run("process", "--config", "config.yaml"))


OTHER = "tests.support.other_backend:OtherBackend"


def test_a_backend_of_another_package_has_flags_and_keys_of_its_own(command_line: CommandLine, tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks")
    done = command_line.process(tool_pool_mode=OTHER, other_file="trace")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trace").read_text() == "started"
    config = {"env": {"tool_pool_mode": OTHER, "other_file": "from file", "other_words": ["as", "configured"]}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = command_line.process(config="config.yaml", other_file="from flag")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "from flag").read_text() == "as configured"
    assert not (tmp_path / "from file").exists()


def test_options_belong_to_the_backend_that_is_chosen(command_line: CommandLine, tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks")
    (tmp_path / "config.yaml").write_text(json.dumps({"env": {"tool_pool_mode": OTHER, "other_files": "trace"}}))
    assert "unknown key env.other_files" in error_of(command_line.process(config="config.yaml"))
    assert "other_file: none is named" in error_of(command_line.process(tool_pool_mode=OTHER))
    # The flag wins over the file, whose key means nothing then.
    (tmp_path / "config.yaml").write_text(json.dumps({"env": {"tool_pool_mode": OTHER, "other_file": "trace"}}))
    assert "unknown key env.other_file" in error_of(command_line.process(config="config.yaml", tool_pool_mode="local"))


def test_the_flags_of_a_backend_are_explained(command_line: CommandLine) -> None:
    done = command_line.run("process", "--env.tool_pool_mode", OTHER, "--help")
    assert (done.returncode, "--env.other_words" in done.stdout) == (0, True)
    assert "--env.other_words" not in command_line.run("process", "--help").stdout


def test_unknown_flags_are_refused(command_line: CommandLine, tmp_path: Path) -> None:
    done = command_line.run("process", "--env.polcy", "oracle")
    assert done.returncode == 2
    assert "--env.polcy" in done.stderr


def test_a_negative_number_is_a_value(command_line: CommandLine, tmp_path: Path) -> None:
    assert "agent_max_steps" in error_of(command_line.run("process", "--env.policy", "oracle", "--env.agent_max_steps", "-1"))


@pytest.mark.parametrize("line", ["{", "[1]", "\udcff"])
def test_a_malformed_task_file_names_the_line(command_line: CommandLine, tmp_path: Path, line: str) -> None:
    tasks = write_task_folder(tmp_path / "tasks") / "tasks.jsonl"
    tasks.write_bytes(tasks.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    assert "tasks/tasks.jsonl" in error_of(command_line.process())


def test_rows_that_cannot_be_used_are_skipped_counted_and_named(command_line: CommandLine, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    row = json.loads((folder / "tasks.jsonl").read_text())
    broken = [{**row, "instance_id": "no-patch", "patch": ""}, {**row, "instance_id": "bad-tests", "FAIL_TO_PASS": "[not json"}]
    with (folder / "tasks.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in broken)
    done = command_line.process()
    assert done.returncode == 0, done.stderr
    assert "row skipped: no-patch: column patch is missing" in done.stdout
    assert "row skipped: bad-tests: column FAIL_TO_PASS" in done.stdout


def test_a_task_that_cannot_be_built_is_set_aside_and_the_others_go_on(command_line: CommandLine, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    row = json.loads((folder / "tasks.jsonl").read_text())
    broken = [
        {**row, "instance_id": "no-commit", "base_commit": "0" * 40},
        {**row, "instance_id": "no-install", "install_commands": ["echo preparing; false"]},
    ]
    with (folder / "tasks.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in broken)
    done = command_line.process()
    assert done.returncode == 0, done.stderr
    assert (
        "set aside: no-commit: git fetch failed" in done.stdout or "set aside: no-commit: git rev-parse failed" in done.stdout
    )
    assert "set aside: no-install: 'echo preparing; false' failed" in done.stdout
    assert [json.loads(line)["scores"] for line in (tmp_path / "out/groups.jsonl").read_text().splitlines()] == [[1.0, 1.0]]


def test_serve_wants_tokens(command_line: CommandLine, tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks")
    done = command_line.run("serve", "--env.policy", "oracle", "--env.dataset_name", "tasks")
    assert "env.policy: 'oracle' has no exact tokens" in error_of(done)


@pytest.mark.filterwarnings("ignore:You are using a local Base URL")
def test_keys_are_not_printed(command_line: CommandLine, tmp_path: Path) -> None:
    write_task_folder(tmp_path / "tasks")
    done = command_line.run(
        "process",
        *("--env.policy=oracle", "--env.dataset_name=missing.jsonl", "--env.use_wandb=false"),
        *("--openai.api_key=very-secret", "--openai.base_url=http://127.0.0.1:9/v1"),
    )
    assert "http://127.0.0.1:9/v1" in done.stdout
    assert "very-secret" not in done.stdout + done.stderr
