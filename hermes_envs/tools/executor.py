"""Runs a model's calls in a slot: the one place where the model's vocabulary meets the sandbox's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hermes_envs.errors import ConfigError
from hermes_envs.tools.call import ToolCall, ToolResult, UnusableCallError
from hermes_envs.tools.external import ExternalTools, NoExternalTools
from hermes_envs.tools.tool import Tool
from hermes_envs.workspace import Workspace
from sandbox_image.protocol import WORKSPACE, ExecutionResult


class ToolOptions(BaseModel):
    """How tool calls are run and what of their output a model gets to read."""

    model_config = ConfigDict(extra="forbid")

    tool_timeout_s: float = Field(120.0, gt=0, description="Longest a tool call may take; a model can ask for less.")
    require_stateful_sandbox: bool = Field(True, description="Refuse tools that keep something running without isolation.")
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
        self._external: ExternalTools = NoExternalTools()

    def require_isolation(self, isolated: bool) -> None:
        """Refuse to keep something running in slots without isolation, unless `require_stateful_sandbox` is false.

        Raises:
            ConfigError: a tool would.
        """
        stateful = [tool.name for tool in self.tools.values() if tool.keeps_state]
        if stateful and self._options.require_stateful_sandbox and not isolated:
            raise ConfigError(
                f"require_stateful_sandbox: {', '.join(stateful)} would run without isolation; set it to false, or "
                "local_isolation to bubblewrap"
            )

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools as a chat template or an endpoint takes them."""
        return [tool.schema for tool in (*self.tools.values(), *self._external.definitions.values())]

    def offer(self, external: ExternalTools) -> None:
        """Also run calls of these external tools, which need no slot.

        Raises:
            ConfigError: a name is that of a tool of the slot.
        """
        if taken := sorted(self.tools.keys() & external.definitions.keys()):
            raise ConfigError(
                f"tool_server_url: its tool {taken[0]!r} has the name of a tool of the sandbox; disable that or rename"
            )
        self._external = external

    def is_external(self, name: str) -> bool:
        """Whether a tool runs outside of the slot."""
        return name in self._external.definitions

    async def execute(self, workspace: Workspace, call: ToolCall, *, timeout_s: float | None = None) -> ToolResult:
        """Run one call in the workspace, within `timeout_s` if that is less than the call may take anyway.

        Raises:
            SandboxError, ToolServerError: the slot or the tool server failed; whether the call ran is unknown.
        """
        try:
            call = self.check(call)
        except UnusableCallError as problem:
            return ToolResult(call, f"Error: {problem}", ok=False, executed=False)
        result = await self.run(workspace, call, timeout_s=timeout_s)
        # The output of an external tool may hold lone surrogates, which cannot be encoded.
        described = _describe(result).encode("utf-8", "replace").decode()
        content = await self._fit(workspace, call, described)
        return ToolResult(call, content, ok=result.success)

    def check(self, call: ToolCall) -> ToolCall:
        """The call as it can be run.

        Raises:
            UnusableCallError: it cannot; the text is for the model.
        """
        tool = self.tools.get(call.name) or self._external.definitions.get(call.name)
        if tool is not None and call.text is not None and tool.sole_text_parameter is not None:
            call = replace(call, arguments={tool.sole_text_parameter: call.text}, error=None)
        if call.error is not None:
            raise UnusableCallError(call.error)
        if tool is None:
            known = ", ".join([*self.tools, *self._external.definitions])
            raise UnusableCallError(f"there is no tool {call.name!r}; the tools are {known}")
        problem = tool.find_problem(call.arguments)
        if problem is not None:
            raise UnusableCallError(problem)
        return call

    async def run(self, workspace: Workspace, call: ToolCall, *, timeout_s: float | None = None) -> ExecutionResult:
        """Run a call that was checked. Raises as `execute`."""
        if self.is_external(call.name):
            return await self.run_external(call, workspace.slot.trajectory_id, timeout_s=timeout_s)
        given, longest = call.arguments or {}, self._options.tool_timeout_s
        tool, arguments = self.tools[call.name].to_sandbox(workspace, given)
        shortest = min(given.get("timeout") or longest, timeout_s or longest, longest)
        return await workspace.backend.execute(workspace.slot, tool, arguments, timeout_s=shortest)

    async def run_external(self, call: ToolCall, trajectory_id: str, *, timeout_s: float | None = None) -> ExecutionResult:
        """Run a call of an external tool that was checked; it needs no slot.

        Raises:
            ToolServerError: the tool server failed.
        """
        longest = self._options.tool_timeout_s
        return await self._external.call(call.name, call.arguments or {}, min(timeout_s or longest, longest), trajectory_id)

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
    if result.metadata.get("terminal_ended"):
        notes.append("[the terminal has ended with its shell]")
    elif result.metadata.get("action") == "send_keys" and result.metadata["timeout"]:
        notes.append("[the shell does not wait for a command yet]")
    if background := result.metadata.get("background_output"):
        notes.append(f"[meanwhile from background jobs]\n{background}".rstrip("\n"))
    return "\n".join([part for part in (result.output.rstrip("\n"), *notes) if part]) or "[no output]"
