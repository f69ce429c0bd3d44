"""A tool that a model may call, and what a call of it becomes in a slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

from hermes_envs.workspace import Workspace

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
    """Whether processes that a call starts may outlive it."""
