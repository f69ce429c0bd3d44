from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from backends.local import LocalBackend, LocalOptions
from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.tools.call import ToolCall
from hermes_envs.tools.executor import ToolExecutor, ToolOptions
from hermes_envs.tools.external import ExternalTool, ExternalToolbox
from hermes_envs.tools.toolsets import Toolsets
from hermes_envs.workspace import Workspace
from sandbox_image.protocol import ExecutionResult


@pytest.fixture
async def workspace() -> AsyncIterator[Workspace]:
    async with LocalBackend(LocalOptions(local_slots=1)) as backend, backend.slot("test") as slot:
        yield Workspace(backend, slot)


def executor(**options: float) -> ToolExecutor:
    return ToolExecutor(Toolsets().resolve(["default", "bash", "terminal_stateful"]), ToolOptions.model_validate(options))


def call(name: str, arguments: object, id: str = "call-1") -> ToolCall:
    return ToolCall.parse(id, name, arguments)


async def test_calls_become_words_for_the_model(workspace: Workspace) -> None:
    run = executor()
    written = await run.execute(workspace, call("write_file", {"path": "notes/a.txt", "content": "one\ntwo\n"}))
    assert written.ok
    assert (await run.execute(workspace, call("read_file", '{"path": "notes/a.txt"}'))).content == "one\ntwo"
    assert (await run.execute(workspace, call("terminal", {"command": "wc -l < notes/a.txt"}))).content.strip() == "2"
    assert (await run.execute(workspace, call("bash", {"command": "true"}))).content == "[no output]"

    failed = await run.execute(workspace, call("terminal", {"command": "echo no; exit 3"}))
    assert (failed.ok, failed.executed) == (False, True)
    assert failed.content.startswith("no\n[")
    assert "3" in failed.content


async def test_the_working_directory_and_variables_of_the_workspace_are_used(workspace: Workspace) -> None:
    await workspace.run("mkdir -p /workspace/deep/er")
    workspace.cwd, workspace.env = "/workspace/deep", {"COLOUR": "blue"}
    run = executor()
    assert (await run.execute(workspace, call("terminal", {"command": "pwd; echo $COLOUR"}))).content == "/workspace/deep\nblue"
    await run.execute(workspace, call("write_file", {"path": "er/x", "content": "here"}))
    assert await workspace.read("deep/er/x") == b"here"
    assert (await run.execute(workspace, call("read_file", {"path": "/workspace/deep/er/x"}))).content == "here"


async def test_the_stateful_shell_tells_what_became_of_it(workspace: Workspace) -> None:
    await workspace.run("mkdir -p /workspace/deep")
    workspace.cwd, workspace.env = "/workspace/deep", {"COLOUR": "blue"}
    run = executor()

    async def said(command: str, **arguments: float) -> str:
        return (await run.execute(workspace, call("terminal_stateful", {"command": command, **arguments}))).content

    assert await said("pwd; echo $COLOUR; cd /tmp; COLOUR=red") == "/workspace/deep\nblue"
    assert await said("(sleep 0.1; echo late) & pwd; echo $COLOUR") == "/tmp\nred"
    assert await said("sleep 0.3; echo mine") == "mine\n[meanwhile from background jobs]\nlate"
    interrupted = await said("sleep 60", timeout=0.2)
    assert interrupted == "[timed out after 0.2 s; the command was interrupted, the shell goes on]"
    assert await said("pwd; exit 3") == (
        "/tmp\n[exit status 3]\n[the shell has ended with its state and its background jobs; the next command gets a fresh one]"
    )
    assert await said("pwd") == "/workspace/deep\n[this ran in a fresh shell, since the one before had ended]"
    assert await said("pwd") == "/workspace/deep"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (call("browser", {}), "there is no tool 'browser'"),
        (call("terminal", {}), "'command' is a required property"),
        (call("terminal", {"command": 3}), "3 is not of type 'string'"),
        (call("terminal", {"command": "true", "shell": "zsh"}), "'shell' was unexpected"),
        (call("terminal", {"command": "true", "timeout": 0}), "less than or equal to the minimum of 0"),
        (call("terminal", '{"command": "tr'), "not valid JSON"),
        (call("terminal", [1]), "must be a JSON object"),
    ],
)
async def test_a_call_that_cannot_be_run_is_answered(workspace: Workspace, wrong: ToolCall, words: str) -> None:
    result = await executor().execute(workspace, wrong)
    assert (result.ok, result.executed) == (False, False)
    assert result.content.startswith("Error: ")
    assert words in result.content


async def test_plain_text_is_the_argument_of_a_tool_that_needs_one_text(workspace: Workspace) -> None:
    run = executor()
    assert (await run.execute(workspace, call("terminal", "echo one && echo two"))).content == "one\ntwo"
    written = await run.execute(workspace, call("write_file", "notes.txt"))
    assert (written.executed, "not valid JSON" in written.content) == (False, True)


async def test_timeouts(workspace: Workspace) -> None:
    run = executor(tool_timeout_s=1.5)
    result = await run.execute(workspace, call("terminal", {"command": "echo started; sleep 60"}))
    assert not result.ok
    assert "started" in result.content
    assert "timed out" in result.content
    asked_for_more = await run.execute(workspace, call("terminal", {"command": "sleep 60", "timeout": 1000}))
    assert "timed out after 1.5 s" in asked_for_more.content


async def test_long_output_is_cut_and_kept(workspace: Workspace) -> None:
    run = executor(tool_output_max_chars=500)
    result = await run.execute(workspace, call("terminal", {"command": "seq 1 5000"}, id="call/../1"))
    assert len(result.content) < 800
    assert result.content.startswith("1\n2\n")
    assert result.content.endswith("\n5000")
    path = "/workspace/.tool_output/call----1.txt"
    assert path in result.content
    assert (await workspace.read(path)).decode().split() == [str(number) for number in range(1, 5001)]


async def test_what_a_model_writes_cannot_break_the_call(workspace: Workspace) -> None:
    run = executor()
    for command in ("printf '\\377\\376'", "echo '\ud800'", "x" * 300_000, "echo \0"):
        result = await run.execute(workspace, call("terminal", {"command": command}))
        assert isinstance(result.content, str)
    assert (await run.execute(workspace, call("read_file", {"path": "../../etc/passwd"}))).ok is False
    assert (await run.execute(workspace, call("read_file", {"path": "\0"}))).ok is False


async def shout(text: str) -> str:
    if text == "\ud800":
        return text
    if not text:
        raise ValueError("nothing to shout")
    return text.upper() * (1000 if text == "long" else 1)


SHOUT = ExternalTool("shout", "", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}, shout)


async def test_external_tools_stand_beside_those_of_the_slot(workspace: Workspace) -> None:
    run = executor(tool_output_max_chars=500)
    run.offer(ExternalToolbox([SHOUT]))
    assert [schema["function"]["name"] for schema in run.schemas][-1] == "shout"
    assert (await run.execute(workspace, call("shout", '{"text": "hi"}'))).content == "HI"
    assert (await run.execute(workspace, call("shout", "plain text"))).content == "PLAIN TEXT"
    assert (await run.execute(workspace, call("terminal", {"command": "echo hi"}))).content == "hi"
    failed = await run.execute(workspace, call("shout", {"text": ""}))
    assert (failed.content, failed.ok, failed.executed) == ("[ValueError: nothing to shout]", False, True)
    wrong = await run.execute(workspace, call("shout", {"text": 1}))
    assert (wrong.content, wrong.executed) == ("Error: arguments of shout: 1 is not of type 'string'", False)
    assert "the tools are" in (unknown := (await run.execute(workspace, call("whisper", {}))).content)
    assert unknown.endswith("shout")
    long = await run.execute(workspace, call("shout", {"text": "long"}))
    assert "/workspace/.tool_output/call-1.txt" in long.content
    assert await workspace.read(".tool_output/call-1.txt") == b"LONG" * 1000
    assert (await run.execute(workspace, call("shout", "\ud800"))).content == "?"


async def test_a_tool_server_that_fails_is_not_the_models_fault(workspace: Workspace) -> None:
    class Gone(ExternalToolbox):
        async def call(self, *arguments: object) -> ExecutionResult:
            raise ToolServerError("gone")

    run = executor()
    run.offer(Gone([SHOUT]))
    with pytest.raises(ToolServerError, match="gone"):
        await run.execute(workspace, call("shout", {"text": "hi"}))


def test_an_external_tool_with_the_name_of_another_is_refused() -> None:
    with pytest.raises(ConfigError, match="tool_server_url: its tool 'bash' has the name of a tool of the sandbox"):
        executor().offer(ExternalToolbox([replace(SHOUT, name="bash")]))
