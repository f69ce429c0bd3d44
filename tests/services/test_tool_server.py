"""The external tool server, and its client."""

from __future__ import annotations

import asyncio
import os
import re
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.services.options import ServiceOptions
from hermes_envs.tool_server import ToolServer, ToolServerServiceOptions, load_tools, serve
from hermes_envs.tools.external import ExternalTool, ExternalToolbox, ExternalTools
from hermes_envs.tools.sha256 import SHA256
from hermes_envs.tools.tool_server_client import ToolServerOptions, external_tools
from tests.support.services import Client, client_of, refusal, running
from tests.support.waiting import PATIENCE_S

TOKEN = "a-token"
TOOLS = "hermes_envs.tools.sha256:TOOLS"
HI = "8f434346648f6b96df89dda901c5176b10a6d83961dd3c1ac88b59b2dc327aa4"


async def fail(**arguments: Any) -> str:
    raise RuntimeError(f"cannot do that with {sorted(arguments)}")


async def wait() -> str:
    await asyncio.sleep(60)
    return "late"


OTHERS = (
    ExternalTool("fail", "Fails.", {"type": "object"}, fail),
    ExternalTool("wait", "Takes long.", {"type": "object"}, wait, timeout_s=0.3),
)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[Client, int]]:
    given = ToolServerServiceOptions.model_validate({"port": 0, "token": TOKEN, "max_request_bytes": 100_000, **options})
    server = ToolServer(ExternalToolbox([SHA256, *OTHERS], given.max_concurrency), given)
    async with server.service.listening() as port, client_of(port, TOKEN) as client:
        yield client, port


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving() as (client, _):
        yield client


async def test_tools_are_listed_called_and_counted(client: Client) -> None:
    status, listing = await client.get("/tools")
    assert status == 200
    assert listing["tools"][0] == SHA256.schema
    assert await client.post("/execute", {"tool": "sha256", "args": {"text": "hi"}}) == (
        200,
        {"success": True, "output": HI, "error": None, "metadata": {"timeout": False}},
    )
    assert await client.get("/health") == (200, {"status": "ok", "tools": 3, "running": 0, "max_concurrency": 16})


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"tool": "fail", "args": {"a": 1}, "trajectory_id": "t"}, "RuntimeError: cannot do that with ['a']"),
        ({"tool": "wait", "args": {}}, "timed out after 0.3 s"),
        ({"tool": "wait", "args": {}, "timeout": 0.1}, "timed out after 0.1 s"),
        ({"tool": "sha256", "args": {}}, "arguments of sha256: 'text' is a required property"),
        ({"tool": "sha256", "args": {"text": 1}}, "arguments of sha256: 1 is not of type 'string'"),
        ({"tool": "sha256", "args": {"text": "", "x": 1}}, "arguments of sha256: Additional properties are not allowed"),
        ({"tool": "\ud800\n", "args": {}}, "there is no tool '\\ud800\\n'"),
    ],
)
async def test_a_call_that_fails_is_a_result(client: Client, call: dict[str, Any], error: str) -> None:
    status, result = await client.post("/execute", call)
    assert (status, result["success"], result["output"]) == (200, False, "")
    assert result["error"].startswith(error)
    assert (await client.get("/health"))[1]["status"] == "ok"


BAD_CALLS: list[tuple[object, int, str]] = [
    (b"", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[" * 50_000, 400, "not JSON"),
    (b'{"tool": "sha256", "args": {"text": NaN}}', 400, "NaN is not a JSON value"),
    (b" " * 200_000, 413, "more than 100000 bytes"),
    ([], 400, "expected a JSON object, got list"),
    ({}, 400, "field 'tool': Field required"),
    ({"tool": "sha256"}, 400, "field 'args': Field required"),
    ({"tool": 1, "args": {}}, 400, "field 'tool': Input should be a valid string"),
    ({"tool": "sha256", "args": "hi"}, 400, "field 'args': Input should be a valid dictionary"),
    ({"tool": "sha256", "args": {}, "timeout": 0}, 400, "field 'timeout': Input should be greater than 0"),
    ({"tool": "sha256", "args": {}, "timeout": "1"}, 400, "field 'timeout': Input should be a valid number"),
    ({"tool": "sha256", "args": {}, "timeout": 1e300}, 400, "field 'timeout': Input should be less than or equal to 86400"),
    ({"tool": "sha256", "args": {}, "trajectory_id": 4}, 400, "field 'trajectory_id': Input should be a valid string"),
    ({"tool": "sha256", "args": {}, "name": "x"}, 400, "field 'name': Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD_CALLS)
async def test_a_bad_request_is_refused_with_the_reason(client: Client, body: object, status: int, words: str) -> None:
    given, answer = await client.post("/execute", body)
    assert (given, set(answer)) == (status, {"kind", "error"})
    assert words in answer["error"]
    assert (await client.get("/health"))[1]["status"] == "ok"


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "/execute"),
        ("POST", "/tools"),
        ("DELETE", "/tools"),
        ("GET", "/"),
        ("GET", "/tools/"),
        ("GET", "/elsewhere"),
    ],
)
async def test_there_are_no_other_routes(client: Client, method: str, route: str) -> None:
    assert await client.ask(method, route, {}) == (404, {"kind": "not_found", "error": f"no route {method} {route}"})


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", TOKEN[:-1], "ü"])
async def test_without_the_token_nothing_is_answered(client: Client, token: str) -> None:
    for method, route in (("GET", "/tools"), ("POST", "/execute"), ("GET", "/health"), ("GET", "/elsewhere")):
        status, answer = await client.ask(method, route, {"tool": "sha256", "args": {"text": "hi"}}, token=token)
        assert (status, answer["kind"]) == (401, "unauthorized")


async def test_no_web_page_may_ask(client: Client) -> None:
    headers = {"Origin": "http://127.0.0.1", "Authorization": f"Bearer {TOKEN}"}
    async with client.session.get(f"{client.url}/tools", headers=headers) as response:
        assert response.status == 400
        assert "web page" in (await response.json())["error"]


# --- the client --------------------------------------------------------------------------------------------------------


def connected(url: str, token: str = TOKEN) -> Any:
    return external_tools(ToolServerOptions(tool_server_url=url, tool_server_token=SecretStr(token)), (SHA256,))


async def use(tools: ExternalTools, name: str = "sha256", **arguments: Any) -> Any:
    return await tools.call(name, arguments, 5.0, "trajectory")


async def test_the_client_calls_what_the_server_has() -> None:
    async with serving() as (_, port), connected(f"http://127.0.0.1:{port}/") as tools:
        assert list(tools.definitions) == ["sha256", "fail", "wait"]
        assert tools.definitions["sha256"].parameters == SHA256.parameters
        assert (await use(tools, text="hi")).output == HI
        assert "cannot do that" in (await use(tools, "fail")).error
        results = await asyncio.gather(*(use(tools, text=str(number)) for number in range(200)))
        assert len({result.output for result in results}) == 200


async def test_tools_of_the_process_itself_need_no_server() -> None:
    async with connected("inprocess") as tools:
        assert (await use(tools, text="hi")).output == HI
    async with connected("") as tools:
        assert not tools.definitions
        with pytest.raises(ToolServerError):
            await use(tools)
    with pytest.raises(ConfigError, match="needs an environment that has external tools"):
        async with external_tools(ToolServerOptions(tool_server_url="inprocess"), ()):
            pass


async def test_what_a_user_can_get_wrong_is_a_configuration_error() -> None:
    async with serving() as (_, port):
        with pytest.raises(ConfigError, match=r"tool_server_token: http://127.0.0.1:\d+ refuses it"):
            async with connected(f"http://127.0.0.1:{port}", "wrong"):
                pass
    with pytest.raises(ConfigError, match="'localhost:9002' is neither a URL"):
        async with connected("localhost:9002"):
            pass


async def test_a_server_that_is_gone_is_no_result() -> None:
    async with AsyncExitStack() as stack:
        async with serving() as (_, port):
            tools = await stack.enter_async_context(connected(f"http://127.0.0.1:{port}"))
        with pytest.raises(ToolServerError, match="cannot be reached"):
            await use(tools, text="hi")
    with pytest.raises(ToolServerError, match="cannot be reached"):
        async with connected(f"http://127.0.0.1:{port}"):
            pass


async def test_a_server_that_is_late_is_waited_for() -> None:
    async with serving() as (_, port):
        pass

    async def late() -> None:
        await asyncio.sleep(0.2)
        async with serving(port=port):
            await asyncio.sleep(PATIENCE_S)

    server = asyncio.create_task(late())
    async with connected(f"http://127.0.0.1:{port}") as tools:
        assert (await use(tools, text="hi")).output == HI
    server.cancel()
    await asyncio.wait([server])


Reply = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def lying(reply: Reply) -> AsyncIterator[str]:
    """A server that answers `/tools` as it should and everything else as the test wants."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"tools": [SHA256.schema]}) if request.path == "/tools" else await reply(request)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def hang_up(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def says(payload: Any, status: int = 200) -> Reply:
    async def reply(request: web.BaseRequest) -> web.StreamResponse:
        if isinstance(payload, bytes):
            return web.Response(body=payload, status=status)
        return web.json_response(payload, status=status)

    return reply


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (hang_up, "cannot be reached"),
        (says(b"<html>"), "does not answer with JSON"),
        (says(b"\xff"), "does not answer with JSON"),
        (says([]), "not a result"),
        (says({"success": "yes", "output": ""}), "not a result"),
        (says({"success": True}), "not a result: missing field 'output'"),
        (says({"kind": "no_slot", "error": "too\nbusy"}, 503), r"status 503: too\\nbusy"),
        (says("oh", 500), "status 500: no reason was given"),
        (says(b"", 302), "does not answer with JSON"),
    ],
)
async def test_an_answer_that_is_no_result_is_infrastructure(reply: Reply, words: str) -> None:
    async with lying(reply) as url, connected(url) as tools:
        with pytest.raises(ToolServerError, match=words):
            await use(tools, text="hi")


@pytest.mark.parametrize(
    "listing",
    [
        {},
        {"tools": 1},
        {"tools": [1]},
        {"tools": [{"function": {"name": 1, "description": "", "parameters": {}}}]},
        {"tools": [{"function": {"name": "x", "description": "", "parameters": {"type": "thing"}}}]},
    ],
)
async def test_a_listing_that_is_none_is_infrastructure(listing: Any) -> None:
    runner = web.ServerRunner(web.Server(says(listing)))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        with pytest.raises(ToolServerError, match="does not answer as an external tool server"):
            async with connected(f"http://127.0.0.1:{runner.addresses[0][1]}"):
                pass
    finally:
        await runner.cleanup()


# --- the process -------------------------------------------------------------------------------------------------------

MODULE = "hermes_envs.tool_server"


async def test_the_process_serves_tools_of_ones_own_and_ends_in_order(tmp_path: Path) -> None:
    source = """
        import asyncio
        from hermes_envs.tools.external import ExternalTool

        async def shout(text):
            return text.upper()

        async def wait():
            await asyncio.sleep(100)

        SHOUT = ExternalTool("shout", "", {"type": "object", "properties": {"text": {"type": "string"}}}, shout)
        MORE = [ExternalTool("wait", "", {"type": "object"}, wait)]
    """
    (tmp_path / "own_tools.py").write_text(textwrap.dedent(source))
    variables = {"TOOL_SERVER_TOKEN": TOKEN, "TOOL_SERVER_PORT": "1", "TOOL_SERVER_MAX_CONCURRENCY": "3"}
    path = f"{Path(__file__).parent.parent.parent}{os.pathsep}{tmp_path}"
    flags = ("--port", "0", "--tools", f"own_tools:SHOUT,own_tools:MORE,{TOOLS}")
    async with running(MODULE, *flags, token=TOKEN, PYTHONPATH=path, **variables) as service:
        assert (await service.client.post("/execute", {"tool": "shout", "args": {"text": "hi"}}))[1]["output"] == "HI"
        assert (await service.client.get("/health"))[1]["max_concurrency"] == 3
        assert (await service.client.get("/tools", token=""))[0] == 401
        waiting = asyncio.create_task(service.client.post("/execute", {"tool": "wait", "args": {}}))
        await service.client.until("/health", lambda answer: answer["running"] == 1)
        status, said = await service.end()
        assert (status, said) == (0, "")
        await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        ((), {}, "tools: there are none to serve"),
        (("--tools", "os:path"), {}, "'os:path' is no list of ExternalTool"),
        (("--tools", "os:nothing"), {}, "cannot find 'os:nothing': KeyError"),
        (("--tools", "no_such_module:TOOLS"), {}, "No module named 'no_such_module'"),
        (("--tools", TOOLS, "--host", "0.0.0.0"), {}, "token: one is needed to listen at '0.0.0.0'"),
        (("--tools", TOOLS, "--port", "99999"), {}, "port: Input should be less than or equal to 65535"),
        (("--tools", TOOLS), {"TOOL_SERVER_MAX_CONCURRENCY": "0"}, "TOOL_SERVER_MAX_CONCURRENCY: Input should be greater"),
        (("--tools", TOOLS), {"TOOL_SERVER_TOKENS": "x"}, "TOOL_SERVER_TOKENS: there is no such option"),
        (("--tools", TOOLS, "--host", "192.0.2.1"), {"TOOL_SERVER_TOKEN": "x"}, "cannot listen at 192.0.2.1"),
    ],
)
async def test_what_cannot_work_is_named(flags: tuple[str, ...], variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        await serve(ToolServerServiceOptions.read("", flags, variables))


async def test_the_process_says_it_in_one_line() -> None:
    assert await refusal(MODULE, TOOL_SERVER_TOOLS="os:path") == (1, "error: tools: 'os:path' is no list of ExternalTool\n")


async def test_a_token_has_no_flag() -> None:
    status, said = await refusal(MODULE, "--token", "x")
    assert status == 2
    assert "unrecognized arguments: --token" in said


def test_only_main_looks_at_the_process_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "TOOL_SERVER_PORT"):
        monkeypatch.setenv(name, "1")
    assert ServiceOptions().port == 0
    assert ToolServerServiceOptions().port == 9002
    assert ToolServerServiceOptions.model_validate({"max_concurrency": 3}).port == 9002
    assert ToolServerServiceOptions.read("", (), {}).port == 9002


def test_tools_can_be_named_alone_or_in_lists() -> None:
    assert load_tools(["hermes_envs.tools.sha256:SHA256"]) == load_tools([TOOLS]) == [SHA256]
