"""The tools that a model is offered, and what each becomes in a slot."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

from hermes_envs.workspace import Workspace
from sandbox_image.protocol import MAX_OUTPUT_BYTES, MAX_TIMEOUT_S
from sandbox_image.tools.tmux import MAX_HEIGHT, MAX_WIDTH

SandboxCall = tuple[str, dict[str, Any]]
"""A tool of the slot server and its arguments."""


@dataclass(frozen=True)
class ToolDefinition:
    """A function that a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's function form, as chat templates and endpoints take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @property
    def sole_text_parameter(self) -> str | None:
        """The only parameter that a call needs, if that is a text."""
        match self.parameters.get("required"):
            case [str(name)] if self.parameters.get("properties", {}).get(name, {}).get("type") == "string":
                return name
        return None

    def find_problem(self, arguments: object) -> str | None:
        """Why the function cannot be called with these arguments, in words that a model can act on."""
        try:
            violation = next(jsonschema.Draft202012Validator(self.parameters).iter_errors(arguments), None)
        except (RecursionError, OverflowError):
            return f"arguments of {self.name}: too deeply nested, or a number is too large"
        return None if violation is None else f"arguments of {self.name}: {violation.message[:500]}"


@dataclass(frozen=True)
class Tool(ToolDefinition):
    """A function that runs in a slot.

    `to_sandbox` turns validated arguments into a call of the slot server, in the directory and with the variables of the
    workspace.
    """

    to_sandbox: Callable[[Workspace, dict[str, Any]], SandboxCall]
    keeps_state: bool = False
    """Whether something of a call goes on after it."""


def _run_command(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "bash", {"command": arguments["command"], "cwd": workspace.cwd, "env": workspace.env}


def _run_in_shell(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "bash_stateful", {"command": arguments["command"], "cwd": workspace.cwd, "env": workspace.env}


def _run_python(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    command = f"python3 -c {shlex.quote(arguments['code'])}"
    return "bash", {"command": command, "cwd": workspace.cwd, "env": workspace.env}


def _use_terminal(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    # JSON's 80.0 is as much of an integer as 80.
    sizes: dict[str, Any] = {
        name: int(arguments[name]) for name in ("pane_width", "pane_height", "max_bytes") if name in arguments
    }
    return "tmux", {**arguments, **sizes, "cwd": workspace.cwd, "env": workspace.env}


def _read_file(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "read_file", {"path": posixpath.join(workspace.cwd, arguments["path"])}


def _write_file(workspace: Workspace, arguments: dict[str, Any]) -> SandboxCall:
    return "write_file", {"path": posixpath.join(workspace.cwd, arguments["path"]), "content": arguments["content"]}


def _whole(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_COMMAND = _object(
    {
        "command": {"type": "string", "description": "The command line, run by /bin/sh."},
        "timeout": {"type": "number", "exclusiveMinimum": 0, "description": "Seconds after which it is killed."},
    },
    ["command"],
)
_SHELL_COMMAND = _object(
    {
        "command": {"type": "string", "description": "The command line, run by bash."},
        "timeout": {"type": "number", "exclusiveMinimum": 0, "description": "Seconds after which it is interrupted."},
    },
    ["command"],
)
_CODE = _object(
    {
        "code": {"type": "string", "description": "The script."},
        "timeout": {"type": "number", "exclusiveMinimum": 0, "description": "Seconds after which it is killed."},
    },
    ["code"],
)
_SECONDS = {"type": "number", "minimum": 0, "maximum": MAX_TIMEOUT_S}
_TERMINAL = _object(
    {
        "action": {"type": "string", "enum": ["start", "send_keys", "capture", "stream", "resize", "stop"]},
        "keys": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
            "description": "What to type, in order: names of keys as tmux has them (Enter, Escape, Tab, Up, C-c, M-x, F1), "
            'everything else as text. A command line needs its Enter: ["ls -l", "Enter"].',
        },
        "literal": {"type": "boolean", "description": "Type all of `keys` as text, even what looks like the name of a key."},
        "block": {"type": "boolean", "description": "Wait until the shell waits for the next command."},
        "min_wait_s": {**_SECONDS, "description": "Seconds to wait in any case (0.1)."},
        "max_wait_s": {**_SECONDS, "description": "Most seconds to wait with `block` (30)."},
        "history": {"type": "boolean", "description": "`capture` what has scrolled off the top as well."},
        "max_bytes": {**_whole(1, MAX_OUTPUT_BYTES), "description": "Most bytes of events for `stream`."},
        "reset": {"type": "boolean", "description": "`stream` from the beginning."},
        "pane_width": {**_whole(2, MAX_WIDTH), "description": "Columns, for `start` and `resize`."},
        "pane_height": {**_whole(2, MAX_HEIGHT), "description": "Lines, for `start` and `resize`."},
    },
    ["action"],
)
_PATH = {"type": "string", "description": "A path in the workspace, absolute or relative to the working directory."}

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
        Tool("read_file", "Return the content of a text file.", _object({"path": _PATH}, ["path"]), _read_file),
        Tool(
            "write_file",
            "Write a text file, replacing what was there; missing directories are made.",
            _object({"path": _PATH, "content": {"type": "string"}}, ["path", "content"]),
            _write_file,
        ),
    )
}
