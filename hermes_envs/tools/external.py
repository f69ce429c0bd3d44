"""Tools that run outside of the sandbox, where the credentials are."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema

from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.tools.tool import ToolDefinition
from sandbox_image.protocol import ExecutionResult

QUEUE_TIMEOUT_S = 60.0
"""How long a call waits for one of `max_concurrency` places."""
MAX_OUTPUT_CHARS = 1_000_000

logger = logging.getLogger(__name__)


class ExternalTools(ABC):
    """Tools somewhere outside of the sandbox, and the way to call them."""

    definitions: Mapping[str, ToolDefinition]

    @abstractmethod
    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float, trajectory_id: str | None) -> ExecutionResult:
        """Call a tool with arguments that its schema allows; a tool that fails is a result.

        Raises:
            ToolServerError: the tool could not be called.
        """


class NoExternalTools(ExternalTools):
    """An empty set: every call fails."""

    definitions: Mapping[str, ToolDefinition] = {}

    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float, trajectory_id: str | None) -> ExecutionResult:
        """See `ExternalTools.call`."""
        raise ToolServerError(f"there is no external tool {name!r}")


@dataclass(frozen=True)
class ExternalTool(ToolDefinition):
    """A tool made of an async function, which gets the validated arguments as keywords.

    What it returns is the output: a text, or anything that JSON can hold. What it raises is the error that the model reads.
    """

    function: Callable[..., Awaitable[object]]
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what could not be called.

        Raises:
            ConfigError: `parameters` is not a schema of an object, the function is not async, or the timeout is not above 0.
        """
        try:
            jsonschema.Draft202012Validator.check_schema(self.parameters)
        except jsonschema.SchemaError as reason:
            raise ConfigError(f"tool {self.name!r}: its parameters are not a JSON schema: {reason.message}") from reason
        if self.parameters.get("type") != "object":
            raise ConfigError(f"tool {self.name!r}: its parameters must be a schema of type 'object'")
        if not inspect.iscoroutinefunction(self.function):
            raise ConfigError(f"tool {self.name!r}: its function is not async")
        if not self.timeout_s > 0:
            raise ConfigError(f"tool {self.name!r}: its timeout must be above 0")


class ExternalToolbox(ExternalTools):
    """Runs external tools in this process, `max_concurrency` at once.

    A tool that raises, hangs or exits does not affect other calls.
    """

    def __init__(
        self, tools: Iterable[ExternalTool], max_concurrency: int = 16, queue_timeout_s: float = QUEUE_TIMEOUT_S
    ) -> None:
        """Index the tools by name.

        Raises:
            ConfigError: two have the same name.
        """
        self._tools: dict[str, ExternalTool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise ConfigError(f"there are two external tools {tool.name!r}")
            self._tools[tool.name] = tool
        self.definitions = self._tools
        self._queue_timeout_s = queue_timeout_s
        self._places = asyncio.Semaphore(max_concurrency)
        self._running: set[asyncio.Task[ExecutionResult]] = set()

    @property
    def running(self) -> int:
        """Number of calls that run, including those that timed out and ignore their cancellation."""
        return len(self._running)

    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float, trajectory_id: str | None) -> ExecutionResult:
        """See `ExternalTools.call`. The tool's own timeout holds if it is shorter."""
        tool = self._tools[name]
        timeout_s = min(timeout_s, tool.timeout_s)
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await self._places.acquire()
        except TimeoutError as reason:
            raise ToolServerError(f"all places for external tools were taken for {self._queue_timeout_s:g} s") from reason
        task = asyncio.create_task(_run(tool, arguments, trajectory_id), name=f"external tool {name}")
        self._running.add(task)
        task.add_done_callback(self._end)
        try:
            await asyncio.wait([task], timeout=timeout_s)
            if task.done() and not task.cancelled():
                return task.result()
            if task.done():
                return ExecutionResult(success=False, output="", error="it was cancelled", metadata={"timeout": False})
            return _timed_out(timeout_s)
        finally:
            # A tool that ignores the cancellation keeps its place until it ends.
            task.cancel()

    def _end(self, task: asyncio.Task[ExecutionResult]) -> None:
        self._running.discard(task)
        self._places.release()


def _timed_out(timeout_s: float) -> ExecutionResult:
    return ExecutionResult(success=False, output="", error=f"timed out after {timeout_s:g} s", metadata={"timeout": True})


async def _run(tool: ExternalTool, arguments: dict[str, Any], trajectory_id: str | None) -> ExecutionResult:
    """Run a tool, with arguments of its own to change. It is code of others: each exception of it becomes a failed result."""
    try:
        output = _as_text(await tool.function(**copy.deepcopy(arguments)))
    except (Exception, SystemExit) as reason:
        logger.exception("external tool %s failed in trajectory %r", tool.name, trajectory_id)
        error = f"{type(reason).__name__}: {reason}"
        return ExecutionResult(success=False, output="", error=error[:MAX_OUTPUT_CHARS], metadata={"timeout": False})
    return ExecutionResult(success=True, output=output, metadata={"timeout": False})


def _as_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left_out = len(text) - MAX_OUTPUT_CHARS
    return text if left_out <= 0 else f"{text[:MAX_OUTPUT_CHARS]}\n[... {left_out} characters dropped ...]"
