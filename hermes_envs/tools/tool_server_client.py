"""The client of an external tool server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import jsonschema
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from backends.codec import shown
from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.tools.external import (
    MAX_OUTPUT_CHARS,
    QUEUE_TIMEOUT_S,
    ExternalTool,
    ExternalToolbox,
    ExternalTools,
    NoExternalTools,
)
from hermes_envs.tools.tool import ToolDefinition
from sandbox_image.protocol import ExecutionResult, ProtocolError

IN_PROCESS = "inprocess"
ATTEMPTS = 4
"""How often a connection is tried before the server counts as unreachable."""

_MARGIN_S = QUEUE_TIMEOUT_S + 15.0
_ANSWER_BYTES = 12 * MAX_OUTPUT_CHARS + (1 << 20)  # one character can become two \u0000


class ToolServerOptions(BaseModel):
    """Where external tools are."""

    model_config = ConfigDict(extra="forbid")

    tool_server_url: str = Field(
        "", description="External tool server; `inprocess` for the tools that the environment itself has; empty for none."
    )
    # Neither shown nor written down where configurations are.
    tool_server_token: SecretStr = Field(SecretStr(""), exclude=True, description="Token of the external tool server.")


class _Function(BaseModel):
    name: str
    description: str
    parameters: dict[str, Any]


class _Schema(BaseModel):
    function: _Function


class _Listing(BaseModel):
    tools: list[_Schema]


@asynccontextmanager
async def external_tools(options: ToolServerOptions, own: Iterable[ExternalTool]) -> AsyncIterator[ExternalTools]:
    """The external tools that the options name; `own` are those that can run in this process.

    Raises:
        ConfigError: the options cannot work, or the server refuses the token.
        ToolServerError: the server cannot be reached, or does not answer as one.
    """
    if options.tool_server_url == IN_PROCESS:
        toolbox = ExternalToolbox(own)
        if not toolbox.definitions:
            raise ConfigError(f"tool_server_url: {IN_PROCESS!r} needs an environment that has external tools")
        yield toolbox
    elif options.tool_server_url:
        async with ToolServerClient.connected(options.tool_server_url, options.tool_server_token.get_secret_value()) as client:
            yield client
    else:
        yield NoExternalTools()


class ToolServerClient(ExternalTools):
    """Calls the tools of a server over HTTP. Replies are validated before they are used."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self.definitions: Mapping[str, ToolDefinition] = {}

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str, token: str) -> AsyncIterator[ToolServerClient]:
        """A client that knows the server's tools. Raises as `external_tools`."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"tool_server_url: {url!r} is neither a URL of http or https nor {IN_PROCESS!r}")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
            client = cls(session, url)
            await client._learn_tools()
            yield client

    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float, trajectory_id: str | None) -> ExecutionResult:
        """See `ExternalTools.call`. Retried only while no connection can be made: a tool need not be idempotent."""
        request = {"tool": name, "args": arguments, "timeout": timeout_s, "trajectory_id": trajectory_id}
        status, answer = await self._ask("POST", "/execute", request, timeout_s + _MARGIN_S)
        if status != 200:
            raise ToolServerError(f"the tool server refused a call of {name!r} with status {status}: {_reason(answer)}")
        try:
            return ExecutionResult.from_json(answer)
        except ProtocolError as reason:
            raise ToolServerError(f"the tool server's answer is not a result: {shown(str(reason))}") from reason

    async def _learn_tools(self) -> None:
        status, answer = await self._ask("GET", "/tools", None, _MARGIN_S)
        if status == 401:
            raise ConfigError(f"tool_server_token: {self._url} refuses it")
        if status != 200:
            raise ToolServerError(f"{self._url} refused to name its tools with status {status}: {_reason(answer)}")
        try:
            listed = [ToolDefinition(**vars(schema.function)) for schema in _Listing.model_validate(answer).tools]
            for definition in listed:
                jsonschema.Draft202012Validator.check_schema(definition.parameters)
        except (ValidationError, jsonschema.SchemaError) as reason:
            raise ToolServerError(
                f"{self._url} does not answer as an external tool server: {shown(repr(answer))[:200]}"
            ) from reason
        self.definitions = {definition.name: definition for definition in listed}

    async def _ask(self, method: str, route: str, body: object, timeout_s: float) -> tuple[int, Any]:
        payload = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        refused = retry_if_exception_type(aiohttp.ClientConnectorError)
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(ATTEMPTS), wait=wait_exponential(multiplier=0.1), retry=refused, reraise=True
            ):
                with attempt:
                    async with self._session.request(
                        method, self._url + route, data=payload, headers=headers, timeout=timeout, allow_redirects=False
                    ) as response:
                        return response.status, json.loads(await _read(response))
        except (aiohttp.ClientError, OSError) as reason:
            raise ToolServerError(
                f"the tool server {self._url} cannot be reached: {reason or type(reason).__name__}"
            ) from reason
        except ValueError as reason:
            raise ToolServerError(f"the tool server {self._url} does not answer with JSON") from reason
        raise AssertionError("unreachable")


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > _ANSWER_BYTES:
            raise ToolServerError(f"the tool server's answer is longer than {_ANSWER_BYTES} bytes")
    return bytes(content)


def _reason(answer: object) -> str:
    reason = answer.get("error") if isinstance(answer, dict) else None
    return shown(reason if isinstance(reason, str) else "no reason was given")
