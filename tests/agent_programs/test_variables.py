from __future__ import annotations

from pathlib import Path

import pytest

from backends import BackendConfigError, BackendOptions, options_with
from hermes_envs.agent_programs.pool import TerminalPool
from hermes_envs.agent_programs.variables import terminal_from_variables
from hermes_envs.errors import ConfigError


@pytest.mark.parametrize("which", [{"TERMINAL_ENV": "local"}, {"TERMINAL_ENV": "slot_pool", "TERMINAL_SLOT_BACKEND": "local"}])
def test_terminals_as_the_variables_want_them(tmp_path: Path, which: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    variables = which | {
        "TERMINAL_LOCAL_SLOTS": "2",
        "TERMINAL_LOCAL_DATA_DIR": str(tmp_path),
        "TERMINAL_CWD": "/usr",
        "TERMINAL_TIMEOUT": "0.5",
        # Of backends that are not chosen, and of hermes-agent itself.
        "TERMINAL_MODAL_IMAGE": "python:3.11",
        "TERMINAL_NOMAD_MIN": "",
        "TERMINAL_LIFETIME_SECONDS": "300",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    first, second = terminal_from_variables("task"), terminal_from_variables("task")
    try:
        assert first.execute("pwd; echo x > /workspace/file")["output"] == "/usr\n"
        assert second.execute("cat /workspace/file")["output"] == "x\n"
        assert first.execute("sleep 10")["returncode"] == 124
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        TerminalPool.shared(BackendOptions(local_slots=2, local_data_dir=str(tmp_path))).close()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TERMINAL_TIMEOUT": "soon"}, "TERMINAL_TIMEOUT: Input should be a valid number"),
        ({"TERMINAL_TIMEOUT": "0"}, "TERMINAL_TIMEOUT: Input should be greater than 0"),
        ({"TERMINAL_LOCAL_SLOTS": "0"}, "TERMINAL_LOCAL_SLOTS: Input should be greater than or equal to 1"),
        ({"TERMINAL_SLOT_PROCESSES": "1"}, "TERMINAL_SLOT_PROCESSES: Input should be greater than or equal to 16"),
        ({"TERMINAL_ALLOW_NETWORK": "perhaps"}, "TERMINAL_ALLOW_NETWORK: Input should be a valid boolean"),
    ],
)
def test_what_cannot_be_honoured_is_named(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        terminal_from_variables("task", variables)


@pytest.mark.parametrize(
    ("mode", "variable"),
    [
        ("docker", "TERMINAL_DOCKER_IMAGE"),
        *(("nomad", f"TERMINAL_NOMAD_{name}") for name in ("ADDRESS", "DRIVER", "IMAGE", "SLOTS", "MIN", "MAX", "AUTOSTART")),
        *((mode, f"TERMINAL_{mode.upper()}_HOST") for mode in ("ssh", "singularity", "slurm")),
        *(("modal", f"TERMINAL_MODAL_{name}") for name in ("MODE", "IMAGE", "SLOTS", "MIN", "MAX", "POOL_MAX", "IDLE_TIMEOUT")),
    ],
)
def test_backends_that_this_version_does_not_have_are_refused(mode: str, variable: str) -> None:
    for chosen in ({"TERMINAL_ENV": mode}, {"TERMINAL_ENV": "slot_pool", "TERMINAL_SLOT_BACKEND": mode}):
        for variables in (chosen, chosen | {variable: "1"}):
            with pytest.raises(BackendConfigError, match=f"'{mode}' is not available in this version; available: local"):
                terminal_from_variables("task", variables)


def test_a_pool_of_slots_is_no_backend() -> None:
    with pytest.raises(BackendConfigError, match="'slot_pool' is not available"):
        terminal_from_variables("task", {"TERMINAL_ENV": "slot_pool", "TERMINAL_SLOT_BACKEND": "slot_pool"})


def test_a_backend_of_another_package_with_options_of_its_own(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    variables = {
        "TERMINAL_ENV": "tests.support.other_backend:OtherBackend",
        "TERMINAL_OTHER_FILE": str(trace),
        "TERMINAL_LOCAL_SLOTS": "1",
    }
    terminal = terminal_from_variables("task", variables)
    try:
        assert terminal.execute("echo x")["output"] == "x\n"
        assert trace.read_text() == "started"
    finally:
        terminal.cleanup()
        options = options_with(BackendOptions, variables["TERMINAL_ENV"])
        TerminalPool.shared(options(tool_pool_mode=variables["TERMINAL_ENV"], other_file=str(trace), local_slots=1)).close()
