"""Runs a model's calls in a slot: the one place where the model's vocabulary meets the sandbox's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jsonschema
from pydantic import BaseModel, ConfigDict, Field

from hermes_envs.tools.call import ToolCall, ToolResult
from hermes_envs.tools.tool import Tool
from hermes_envs.workspace import Workspace
from sandbox_image.protocol import WORKSPACE, ExecutionResult


class ToolOptions(BaseModel):
    """How tool calls are run and what of their output a model gets to read."""

    model_config = ConfigDict(extra="forbid")

    tool_timeout_s: float = Field(120.0, gt=0, description="Longest a tool call may take; a model can ask for less.")
    tool_output_max_chars: int = Field(
        20_000, ge=200, description="Longest tool output that a model gets; the whole of a longer one is kept in the workspace."
    )


class ToolExecutor:
    """Validates calls against the tools' schemas, runs them, and puts the outcome into words for the model.

    A call that cannot be run is answered, never raised: the model can read what was wrong and try again.
    """

    def __init__(self, tools: Mapping[str, Tool], options: ToolOptions) -> None:
        self.tools = tools
        self._options = options

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools as a chat template or an endpoint takes them."""
        return [tool.schema for tool in self.tools.values()]

    async def execute(self, workspace: Workspace, call: ToolCall) -> ToolResult:
        """Run one call in the workspace.

        Raises:
            SandboxError: the slot failed; the call's fate is unknown.
        """
        call = self._with_text_as_argument(call)
        problem = self._find_problem(call)
        if problem is not None or call.arguments is None:
            return ToolResult(call, f"Error: {problem}", ok=False, executed=False)
        tool, arguments = self.tools[call.name].to_sandbox(workspace, call.arguments)
        timeout_s = min(call.arguments.get("timeout") or self._options.tool_timeout_s, self._options.tool_timeout_s)
        result = await workspace.backend.execute(workspace.slot, tool, arguments, timeout_s=timeout_s)
        content = await self._fit(workspace, call, _describe(result))
        return ToolResult(call, content, ok=result.success, metadata=result.metadata)

    def _with_text_as_argument(self, call: ToolCall) -> ToolCall:
        tool = self.tools.get(call.name)
        if tool is None or call.text is None or tool.sole_text_parameter is None:
            return call
        return replace(call, arguments={tool.sole_text_parameter: call.text}, error=None)

    def _find_problem(self, call: ToolCall) -> str | None:
        if call.error is not None:
            return call.error
        if call.name not in self.tools:
            return f"there is no tool {call.name!r}; the tools are {', '.join(self.tools)}"
        violation = next(jsonschema.Draft202012Validator(self.tools[call.name].parameters).iter_errors(call.arguments), None)
        return None if violation is None else f"arguments of {call.name}: {violation.message[:500]}"

    async def _fit(self, workspace: Workspace, call: ToolCall, content: str) -> str:
        budget = self._options.tool_output_max_chars
        if len(content) <= budget:
            return content
        path = f"{WORKSPACE}/.tool_output/{_file_name(call.id)}.txt"
        kept = await workspace.write(path, content.encode("utf-8", errors="replace"))
        where = f"the whole output is in {path}" if kept.success else f"the whole output could not be kept: {kept.error}"
        head, tail = content[: budget * 2 // 3], content[-(budget // 3) :]
        return f"{head}\n[... {len(content) - len(head) - len(tail)} characters left out; {where} ...]\n{tail}"


def _file_name(call_id: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in call_id)[:64] or "call"


def _describe(result: ExecutionResult) -> str:
    exit_code = result.metadata.get("exit_code")
    notes = [f"[{result.error}]"] if result.error else []
    if not result.error and exit_code:
        notes.append(f"[exit code {exit_code}]")
    if result.metadata.get("shell_restarted"):
        notes.insert(0, "[this ran in a fresh shell, since the one before had ended]")
    if result.metadata.get("shell_ended"):
        notes.append("[the shell has ended with its state and its background jobs; the next command gets a fresh one]")
    if background := result.metadata.get("background_output"):
        notes.append(f"[meanwhile from background jobs]\n{background}".rstrip("\n"))
    return "\n".join([part for part in (result.output.rstrip("\n"), *notes) if part]) or "[no output]"
