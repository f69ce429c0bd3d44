"""External tools over HTTP: they run here, with the credentials of this process, and never in a sandbox.

    TOOL_SERVER_TOKEN=secret python -m hermes_envs.tool_server --port 9002 --tools hermes_envs.tools.sha256:TOOLS

    GET  /tools     -> {"tools": [function schema]}
    POST /execute   {"tool", "args", "timeout"?, "trajectory_id"?} -> {"success", "output", "error", "metadata"}
    GET  /health    -> {"status", "tools", "running", "max_concurrency"}

Every option is also a variable, `TOOL_SERVER_*`. When it listens it prints `{"ready": true, "port": P}`. It stops on SIGTERM.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from backends.options import Names
from hermes_envs.errors import ConfigError
from hermes_envs.services.http_service import Body, HttpService, announce, get, post, result_json, stop_signal, unusable_json
from hermes_envs.services.options import ServiceOptions
from hermes_envs.tools.external import ExternalTool, ExternalToolbox
from sandbox_image.protocol import MAX_TIMEOUT_S


class ToolServerServiceOptions(ServiceOptions):
    """Options of the external tool server."""

    model_config = SettingsConfigDict(env_prefix="TOOL_SERVER_")

    port: int = Field(9002, ge=0, le=65535, description="Port to listen at; 0 for a free one.")
    tools: Names = Field([], description="What to serve: MODULE:NAME of a list of `ExternalTool`, separated by commas.")
    max_concurrency: int = Field(16, ge=1, description="Most tools that run at once; further calls wait.")


class ExternalCall(Body):
    """Call a tool. `timeout` is in seconds; `trajectory_id` appears in the log."""

    tool: str
    args: dict[str, Any]
    timeout: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S)
    trajectory_id: str | None = None


class ToolServer:
    """Serves a toolbox."""

    def __init__(self, toolbox: ExternalToolbox, options: ToolServerServiceOptions) -> None:
        self._toolbox = toolbox
        self._options = options
        routes = (
            get("/tools", self._list),
            post("/execute", ExternalCall, self._execute),
            get("/health", self._health),
        )
        self.service = HttpService(routes, options)

    async def _list(self) -> dict[str, Any]:
        return {"tools": [definition.schema for definition in self._toolbox.definitions.values()]}

    async def _execute(self, call: ExternalCall) -> dict[str, Any]:
        timeout_s = MAX_TIMEOUT_S if call.timeout is None else call.timeout
        definition = self._toolbox.definitions.get(call.tool)
        problem = f"there is no tool {call.tool!r}" if definition is None else definition.find_problem(call.args)
        if problem is not None:
            return unusable_json(problem)
        return result_json(await self._toolbox.call(call.tool, call.args, timeout_s, call.trajectory_id))

    async def _health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "tools": len(self._toolbox.definitions),
            "running": self._toolbox.running,
            "max_concurrency": self._options.max_concurrency,
        }


def load_tools(names: Sequence[str]) -> list[ExternalTool]:
    """Import the tools that `MODULE:NAME` names.

    Raises:
        ConfigError: a name cannot be imported or is no list of `ExternalTool`, or there are no tools.
    """
    tools: list[ExternalTool] = []
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            found = vars(importlib.import_module(module))[attribute]
        except (ImportError, ValueError, KeyError) as reason:
            raise ConfigError(f"tools: cannot find {name!r}: {type(reason).__name__}: {reason}") from reason
        listed = [found] if isinstance(found, ExternalTool) else found
        if not isinstance(listed, Sequence) or not all(isinstance(tool, ExternalTool) for tool in listed):
            raise ConfigError(f"tools: {name!r} is no list of ExternalTool")
        tools += listed
    if not tools:
        raise ConfigError("tools: there are none to serve; name some with --tools or TOOL_SERVER_TOOLS")
    return tools


async def serve(options: ToolServerServiceOptions) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the tools cannot be had, or the address is taken.
    """
    stop = stop_signal()
    server = ToolServer(ExternalToolbox(load_tools(options.tools), options.max_concurrency), options)
    async with server.service.listening() as port:
        announce(port)
        await stop.wait()
        server.service.closing = True


def main() -> int:
    """Run until told to stop; the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(ToolServerServiceOptions.read(__doc__ or "", sys.argv[1:], os.environ)))
    except ConfigError as reason:
        sys.stderr.write(f"error: {reason}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
