"""scripts/llama_server, and policy `messages` on what it starts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.real_engines.llama_server import SCRIPT, llama_server

CALL = '<tool_call>\n{"name": "terminal", "arguments": {"command": "cat token.txt"}}\n</tool_call>'


@pytest.mark.engine
async def test_a_model_that_calls_at_random_scores_nothing_and_breaks_nothing(gguf_file: Path, tmp_path: Path) -> None:
    """The server answers malformed calls with status 500: such a turn is asked for again."""
    async with llama_server(gguf_file, "--context", "8192") as url:
        groups = await smoke(url, tmp_path)
    assert [group["scores"] for group in groups] == [[0.0] * 4] * 2


@pytest.mark.engine
async def test_calls_that_are_left_as_text_are_made(gguf_file: Path, tmp_path: Path) -> None:
    """The random model cannot but make the call that a grammar allows."""
    grammar = tmp_path / "call.gbnf"
    grammar.write_text(f"root ::= {json.dumps(CALL)}\n")
    async with llama_server(gguf_file, "--context", "8192", "--skip-chat-parsing", "--grammar-file", str(grammar)) as url:
        groups = await smoke(url, tmp_path)
    for group in groups:
        for metadata, messages in zip(group["overrides"], group["messages"], strict=True):
            assert metadata["tool_calls_executed_ok"] == 3
            (token,) = {message["content"].strip() for message in messages if message["role"] == "tool"}
            assert len(token) == 32


async def smoke(url: str, folder: Path) -> list[dict[str, Any]]:
    """Two groups of the smoke environment, by its command line."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hermes_envs.smoke", "process", "--env.policy=messages", "--env.use_wandb=false"),
        *("--env.total_steps=2", "--env.group_size=4", "--env.agent_max_steps=3", "--env.agent_max_tokens=120"),
        *(f"--openai.base_url={url}/v1", "--openai.model_name=local", "--openai.api_key=x"),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return _lines(folder / "data" / "smoke.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], env=os.environ | variables, capture_output=True, text=True, check=False)


def test_the_server_gets_its_options_and_what_else_is_given(tmp_path: Path) -> None:
    model = tmp_path / "a model.gguf"
    model.touch()
    ended = run(model, "--slots", "3", "--threads", "8", "--context", "1000", "--mlock", HERMES_ENVS_LLAMA_SERVER="echo")
    assert ended.returncode == 0, ended.stderr
    assert f"--model {model} --alias local --host 127.0.0.1 --port 8080 --parallel 3 --ctx-size 3000 " in ended.stdout
    assert ended.stdout.endswith(" --threads 8 --mlock\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the model's file comes first"),
        (("--slots", "2", SCRIPT), "the model's file comes first"),
        (("missing.gguf",), "no such model: missing.gguf"),
        ((SCRIPT, "--slots"), "--slots needs a value"),
        ((SCRIPT, "--slots", "0"), "--slots takes a number from 1, not 0"),
        ((SCRIPT, "--context", "16k"), "--context takes a number from 1, not 16k"),
        ((SCRIPT,), "no program nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: tuple[str | Path, ...], words: str) -> None:
    ended = run(*arguments, HERMES_ENVS_LLAMA_SERVER="nowhere")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert words in ended.stderr


def test_help_says_how_it_is_used() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    assert "scripts/llama_server MODEL.gguf" in ended.stdout
