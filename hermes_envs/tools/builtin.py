"""The tools that a model is offered unless an environment brings its own."""

from __future__ import annotations

import posixpath
import shlex
from typing import Any

from hermes_envs.tools.tool import SandboxCall, Tool
from hermes_envs.workspace import Workspace
from sandbox_image.openapi import schema_of
from sandbox_image.protocol import Wire
from sandbox_image.tools.files import ReadFileArguments, WriteFileArguments
from sandbox_image.tools.shell import BashArguments
from sandbox_image.tools.tmux import TmuxArguments


def _run_command(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "bash", {"command": arguments["command"], "cwd": workspace.cwd, "env": workspace.env}


def _run_in_shell(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "bash_stateful", {"command": arguments["command"], "cwd": workspace.cwd, "env": workspace.env}


def _run_python(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    command = f"python3 -c {shlex.quote(arguments['code'])}"
    return "bash", {"command": command, "cwd": workspace.cwd, "env": workspace.env}


def _use_terminal(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    # JSON's 80.0 is as much of an integer as 80; the slot server takes 80 alone.
    kinds = _TERMINAL["properties"]
    typed = {name: int(value) if kinds[name].get("type") == "integer" else value for name, value in arguments.items()}
    return "tmux", {**typed, "cwd": workspace.cwd, "env": workspace.env}


def _read_file(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "read_file", {"path": posixpath.join(workspace.cwd, arguments["path"])}


def _write_file(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "write_file", {"path": posixpath.join(workspace.cwd, arguments["path"]), "content": arguments["content"]}


def _parameters(message: type[Wire], *hidden: str, **added: str | dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of the arguments that a model may give, made from the message that they are sent in.

    Args:
        message: Says names, types, ranges and what is required.
        hidden: Fields that a model may not set.
        added: By field, its description, or further keywords of its schema. A name that is no field becomes one.
    """
    schema = schema_of(message)
    properties = {name: _without_null(field) for name, field in schema["properties"].items() if name not in hidden}
    for name, keywords in added.items():
        properties[name] = properties.get(name, {}) | ({"description": keywords} if isinstance(keywords, str) else keywords)
    return {"type": "object", "properties": properties, "required": schema["required"], "additionalProperties": False}


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that a model leaves out where a program may send null; it is not told the default either."""
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    kind = kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}
    return kind | {keyword: value for keyword, value in field.items() if keyword not in ("anyOf", "default")}


def _seconds(until: str) -> dict[str, Any]:
    return {"type": "number", "exclusiveMinimum": 0, "description": f"Seconds after which it is {until}."}


_BASH_HIDDEN = ("cwd", "env", "max_output_bytes")
_COMMAND = _parameters(BashArguments, *_BASH_HIDDEN, command="The command line, run by /bin/sh.", timeout=_seconds("killed"))
_SHELL_COMMAND = _parameters(
    BashArguments, *_BASH_HIDDEN, command="The command line, run by bash.", timeout=_seconds("interrupted")
)
_CODE = {
    "type": "object",
    "properties": {"code": {"type": "string", "description": "The script."}, "timeout": _seconds("killed")},
    "required": ["code"],
    "additionalProperties": False,
}
_TERMINAL = _parameters(
    TmuxArguments,
    "cwd",
    "env",
    keys={
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
        "description": "What to type, in order: names of keys as tmux has them (Enter, Escape, Tab, Up, C-c, M-x, F1), "
        'everything else as text. A command line needs its Enter: ["ls -l", "Enter"].',
    },
    literal="Type all of `keys` as text, even what looks like the name of a key.",
    block="Wait until the shell waits for the next command.",
    min_wait_s="Seconds to wait in any case (0.1).",
    max_wait_s="Most seconds to wait with `block` (30).",
    history="`capture` what has scrolled off the top as well.",
    max_bytes="Most bytes of events for `stream`.",
    reset="`stream` from the beginning.",
    pane_width="Columns, for `start` and `resize`.",
    pane_height="Lines, for `start` and `resize`.",
)
_PATH = "A path in the workspace, absolute or relative to the working directory."
_READ = _parameters(ReadFileArguments, "encoding", "max_bytes", path=_PATH)
_WRITE = _parameters(WriteFileArguments, "encoding", "executable", path=_PATH)

BUILTIN_TOOLS = {
    tool.name: tool
    for tool in (
        *(
            Tool(
                name,
                "Run one command in a fresh POSIX shell in the working directory and return its output. Nothing that it "
                "starts, sets or changes directory to lasts beyond the call; files do.",
                _COMMAND,
                _run_command,
            )
            for name in ("terminal", "bash")
        ),
        *(
            Tool(
                name,
                "Run one command in a bash shell that lasts for the whole task, and return its output. Directory, variables, "
                "functions, virtual environments and background jobs last from one call to the next. Standard input is empty. "
                "A command that takes too long is interrupted like by Ctrl-C; put servers into the background with `&`. What "
                "background jobs print is shown with the next call; `exit` ends the shell, and the next call gets a fresh one.",
                _SHELL_COMMAND,
                _run_in_shell,
                keeps_state=True,
            )
            for name in ("terminal_stateful", "bash_stateful")
        ),
        Tool(
            "python",
            "Run a Python 3 script in the working directory and return what it prints; the value of the last line is not "
            "printed by itself. Each call starts anew: no variable lasts beyond it. Count on the standard library alone.",
            _CODE,
            _run_python,
        ),
        Tool(
            "tmux",
            "Use a terminal (80 x 24 unless `start` says otherwise) for programs that need one: editors, pagers, debuggers, "
            "prompts. First `start` it; then `send_keys` types and returns what the terminal shows afterwards, `capture` just "
            "returns that. Wait long enough for the program to react, with `block` until the shell's prompt is back. `stream` "
            "returns what was printed since the last time as asciicast events. `stop` ends it with all that runs in it.",
            _TERMINAL,
            _use_terminal,
            keeps_state=True,
        ),
        Tool("read_file", "Return the content of a text file.", _READ, _read_file),
        Tool(
            "write_file",
            "Write a text file, replacing what was there; missing directories are made.",
            _WRITE,
            _write_file,
        ),
    )
}
