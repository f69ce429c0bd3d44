"""What a command loads before it has anything to do: imports that take seconds come when they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"atroposlib", "datasets", "huggingface_hub", "math_verify", "numpy", "openai", "pyarrow", "renderers", "sympy"}
HEAVY |= {"tinker", "torch", "transformers", "wandb"}
ENVIRONMENTS = ("swe_smith", "gsm8k_agent", "smoke", "simple_qa")

# The module's own `__main__` block runs, and whatever it ends with.
RUN = """\
import runpy, sys
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
except SystemExit as ended:
    status = ended.code
sys.stderr.write(f"\\nstatus {status!r} loaded {' '.join(sorted({name.split('.')[0] for name in sys.modules}))}\\n")
"""


def run(*arguments: str, source: str = RUN) -> tuple[str, set[str]]:
    """What the command says, and the packages that it has loaded."""
    done = subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, check=True)
    # Libraries may have more to say when the interpreter ends.
    [loaded] = [line.partition(" loaded ")[2] for line in done.stderr.splitlines() if " loaded " in line]
    return done.stdout + done.stderr, set(loaded.split())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("hermes_envs", "--help"), "doctor"),
        (("hermes_envs", "doctor", "--help"), "--require"),
        (("hermes_envs.train", "--help"), "--environment"),
        (("hermes_envs.train",), "error: config: name a file"),
        (("sandbox_image.server", "--help"), "--slots"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_needs_no_environment_loads_nothing_that_is_heavy(command: tuple[str, ...], said: str) -> None:
    output, loaded = run(*command)
    assert said in output
    assert not loaded & HEAVY


@pytest.mark.parametrize("content", ["env: [", "- env", "trainer: {}", "env: {}\nopenai: [{}]\ntinker: {lora_rank: many}"])
def test_an_error_in_a_file_for_the_trainer_loads_nothing_that_is_heavy(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    output, loaded = run("hermes_envs.train", "--config", str(path), "--environment", "gsm8k_agent")
    assert f"error: config: {path}" in output
    assert not loaded & HEAVY


@pytest.fixture(scope="module")
def of_atroposlib() -> set[str]:
    """What comes with the base class of all environments."""
    source = (
        "import atroposlib.envs.base, sys\nsys.stderr.write('\\n loaded ' + ' '.join({n.split('.')[0] for n in sys.modules}))"
    )
    return run(source=source)[1]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("arguments", [("--help",), (), ("process", "--config", "nowhere.yaml")], ids=["help", "none", "error"])
def test_an_environment_loads_little_beside_atroposlib_until_it_runs(
    environment: str, arguments: tuple[str, ...], of_atroposlib: set[str]
) -> None:
    output, loaded = run(f"hermes_envs.{environment}", *arguments)
    assert "usage: " in output or "error: config: cannot read nowhere.yaml" in output
    assert loaded & HEAVY <= of_atroposlib


def test_a_command_is_asked_for() -> None:
    output, _ = run("hermes_envs.simple_qa")
    assert "status 2" in output
    assert "{serve,process,evaluate} [--config FILE]" in output
    assert "error: no command is given" in output
