"""The pool over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from backends import BackendConfigError, create_tool_backend
from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.services.trajectory_slots import TrajectorySlots
from hermes_envs.tool_executor_server import ALIASES, ToolExecutorServer, ToolExecutorServerOptions, serve
from hermes_envs.tools.executor import ToolExecutor
from hermes_envs.tools.external import ExternalToolbox
from hermes_envs.tools.sha256 import SHA256
from hermes_envs.tools.toolsets import Toolsets
from tests.support.processes import below, mentioning
from tests.support.services import Client, client_of, refusal, running
from tests.support.waiting import PATIENCE_S

TOKEN = "a-token"
MODULE = "hermes_envs.tool_executor_server"


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[Client]:
    """The server in this process, with two slots and an external tool."""
    defaults = {"port": 0, "token": TOKEN, "local_slots": 2, "local_data_dir": str(directory), "max_request_bytes": 200_000}
    given = ToolExecutorServerOptions.model_validate(defaults | options)
    executor = ToolExecutor(Toolsets().resolve(given.enabled_toolsets), given)
    executor.offer(ExternalToolbox([SHA256]))
    async with create_tool_backend(given) as backend:
        slots = TrajectorySlots(backend, given.idle_timeout_s)
        server = ToolExecutorServer(backend, executor, slots, given)
        async with server.service.listening() as port, client_of(port, TOKEN) as client:
            yield client
        await slots.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """A server for tests that release what they use."""
    async with serving(tmp_path_factory.mktemp("data")) as client:
        yield client


def call(command: str, trajectory_id: str = "t", **more: Any) -> dict[str, Any]:
    return {"trajectory_id": trajectory_id, "tool": "terminal", "args": {"command": command}, **more}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_trajectory_works_in_its_slot(client: Client) -> None:
    status, result = await client.post("/execute", call("echo hi > file; cat file; exit 3"))
    assert (status, result["success"], result["output"], result["error"]) == (200, False, "hi\n", "exit status 3")
    assert result["metadata"]["exit_code"] == 3
    assert set(result) == {"success", "output", "error", "metadata"}
    written = {"trajectory_id": "t", "tool": "write_file", "args": {"path": "d/x", "content": "ü"}}
    assert (await client.post("/execute", written))[1]["success"]
    assert (await client.post("/execute", call("ls", "other")))[1]["output"] == ""
    status, counts = await client.get("/status")
    assert (counts["trajectories"], counts["calls_running"]) == (2, 0)
    assert counts["pool"]["slots_in_use"] == 2
    assert await client.post("/release", {"trajectory_id": "t"}) == (200, {"released": True})
    assert await client.post("/release", {"trajectory_id": "t", "reset_workspace": False}) == (200, {"released": False})
    assert (await client.post("/execute", call("ls")))[1]["output"] == ""
    for trajectory_id in ("t", "other"):
        await client.post("/release", {"trajectory_id": trajectory_id})
    assert await client.get("/health") == (200, {"status": "ok"})


@pytest.mark.asyncio(loop_scope="module")
async def test_artifacts(client: Client) -> None:
    await client.post("/execute", call("mkdir d; printf abc > d/x; ln -s x d/y"))
    status, content = await client.post("/artifacts/read", {"trajectory_id": "t", "path": "d/x", "encoding": "base64"})
    assert (status, base64.b64decode(content["content"]), content["size"]) == (200, b"abc", 3)
    _, listing = await client.post("/artifacts/list", {"trajectory_id": "t", "recursive": True})
    assert [(entry["path"], entry["type"]) for entry in listing["entries"]] == [
        ("d", "directory"),
        ("d/x", "file"),
        ("d/y", "symlink"),
    ]
    assert (await client.post("/artifacts/list", {"trajectory_id": "t", "recursive": True, "max_entries": 1}))[1]["truncated"]
    _, archive = await client.post("/artifacts/archive", {"trajectory_id": "t", "path": "d", "format": "tgz"})
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive["content"]))) as files:
        assert any(name.endswith("x") for name in files.getnames())
    await client.post("/release", {"trajectory_id": "t"})


@pytest.mark.asyncio(loop_scope="module")
async def test_what_a_model_gets_wrong_is_a_result_and_takes_no_slot(client: Client) -> None:
    for wrong, words in (
        ({"tool": "browser", "args": {}}, "there is no tool 'browser'; the tools are"),
        ({"tool": "terminal", "args": {}}, "'command' is a required property"),
        ({"tool": "terminal", "args": {"command": ["ls"]}}, "is not of type 'string'"),
        ({"tool": "terminal", "args": {"command": "ls", "shell": "zsh"}}, "'shell' was unexpected"),
        ({"tool": "terminal", "args": {"command": "ls", "timeout": -1}}, "less than or equal to the minimum of 0"),
        ({"tool": "\ud800", "args": {}}, "there is no tool"),
        ({"tool": "terminal", "args": {"command": "ls", "\ud800": 1}}, "not valid JSON"),
    ):
        status, result = await client.post("/execute", {"trajectory_id": "t", **wrong})
        assert (status, result["success"], result["metadata"]) == (200, False, {"executed": False})
        assert words in result["error"]
    assert (await client.get("/status"))[1]["trajectories"] == 0
    # These get as far as the slot, which has something to say about them.
    assert (await client.post("/execute", call("echo \0")))[1]["error"] == "command: contains a NUL character"
    outside = {"trajectory_id": "t", "tool": "read_file", "args": {"path": "../../etc/shadow"}}
    assert "outside of the workspace" in (await client.post("/execute", outside))[1]["error"]
    await client.post("/release", {"trajectory_id": "t"})


@pytest.mark.asyncio(loop_scope="module")
async def test_a_shell_keeps_its_state_for_the_trajectory(client: Client) -> None:
    for command, output in (("cd /tmp; x=1", ""), ('pwd; echo "$x"', "/tmp\n1\n")):
        request = {"trajectory_id": "t", "tool": "terminal_stateful", "args": {"command": command}}
        status, result = await client.post("/execute", request)
        assert (status, result["output"]) == (200, output)
    await client.post("/release", {"trajectory_id": "t"})


@pytest.mark.asyncio(loop_scope="module")
async def test_an_external_tool_takes_no_slot(client: Client) -> None:
    request = {"trajectory_id": "t", "tool": "sha256", "args": {"text": "hi"}}
    assert (await client.post("/execute", request))[1]["output"].startswith("8f434346648f6b96")
    assert (await client.get("/status"))[1]["trajectories"] == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_the_shortest_timeout_holds(client: Client) -> None:
    assert (await client.post("/execute", call("sleep 60", timeout=0.2)))[1]["error"] == "timed out after 0.2 s"
    both = {"trajectory_id": "t", "tool": "bash", "args": {"command": "sleep 60", "timeout": 0.1}, "timeout": 30}
    result = (await client.post("/execute", both))[1]
    assert (result["error"], result["metadata"]["timeout"]) == ("timed out after 0.1 s", True)
    await client.post("/release", {"trajectory_id": "t"})


@pytest.mark.asyncio(loop_scope="module")
async def test_calls_that_come_together_share_the_slot(client: Client) -> None:
    await asyncio.gather(*(client.post("/execute", call(f"echo {number} >> all")) for number in range(30)))
    assert len((await client.post("/execute", call("cat all")))[1]["output"].split()) == 30
    assert (await client.get("/status"))[1]["pool"]["slots_in_use"] == 1
    await client.post("/release", {"trajectory_id": "t"})


T = {"trajectory_id": "t"}
EXECUTE = T | {"tool": "terminal", "args": {"command": "true"}}
READ = T | {"path": "file"}
BAD_REQUESTS: list[tuple[str, object, int, str]] = [
    *(
        (route, body, status, words)
        for route in ("/execute", "/release", "/artifacts/read", "/artifacts/list", "/artifacts/archive")
        for body, status, words in (
            (b"", 400, "not JSON"),
            (b"\xff", 400, "not JSON"),
            (b"[" * 100_000, 400, "not JSON"),
            (b" " * 300_000, 413, "more than 200000 bytes"),
            ([], 400, "expected a JSON object, got list"),
            ({}, 400, "field 'trajectory_id': Field required"),
            (EXECUTE | READ | {"trajectory_id": 7}, 400, "field 'trajectory_id': Input should be a valid string"),
            (T | {"slot_id": "slot_0"}, 400, "field 'slot_id': Extra inputs are not permitted"),
        )
    ),
    *(
        (route, body | {"trajectory_id": name}, 400, "field 'trajectory_id': must have 1 to 256 printable characters")
        for route, body in (
            ("/execute", EXECUTE),
            ("/release", T),
            ("/artifacts/read", READ),
            ("/artifacts/list", T),
            ("/artifacts/archive", T),
        )
        for name in ("", "x" * 257, "a\nb", "\0", "\ud800")
    ),
    ("/execute", T | {"args": {}}, 400, "field 'tool': Field required"),
    ("/execute", T | {"tool": "terminal"}, 400, "field 'args': Field required"),
    ("/execute", EXECUTE | {"args": "true"}, 400, "field 'args': Input should be a valid dictionary"),
    ("/execute", EXECUTE | {"tool": None}, 400, "field 'tool': Input should be a valid string"),
    ("/execute", EXECUTE | {"timeout": 0}, 400, "field 'timeout': Input should be greater than 0"),
    ("/execute", EXECUTE | {"timeout": 1e9}, 400, "field 'timeout': Input should be less than or equal to 86400"),
    ("/execute", EXECUTE | {"timeout": True}, 400, "field 'timeout': Input should be a valid number"),
    (
        "/execute",
        b'{"trajectory_id": "t", "tool": "terminal", "args": {"command": "true"}, "timeout": Infinity}',
        400,
        "Infinity",
    ),
    ("/release", T | {"reset_workspace": 1}, 400, "field 'reset_workspace': Input should be a valid boolean"),
    ("/artifacts/read", T, 400, "field 'path': Field required"),
    ("/artifacts/read", READ | {"encoding": "utf-16"}, 400, "field 'encoding': Input should be 'text' or 'base64'"),
    ("/artifacts/read", READ | {"max_bytes": 1.5}, 400, "field 'max_bytes': Input should be a valid integer"),
    ("/artifacts/read", READ | {"max_bytes": 0}, 400, "field 'max_bytes' must be between 1 and"),
    ("/artifacts/read", READ | {"max_bytes": 10**30}, 400, "field 'max_bytes' must be between 1 and"),
    ("/artifacts/read", READ | {"max_bytes": 2}, 413, "file: 3 bytes, the limit is 2"),
    ("/artifacts/read", T | {"path": "../../../etc/passwd"}, 403, "outside of the workspace"),
    ("/artifacts/read", T | {"path": "out/passwd"}, 403, "out"),
    ("/artifacts/read", T | {"path": "fi\0le"}, 400, "NUL"),
    ("/artifacts/read", T | {"path": "\ud800"}, 400, "surrogate"),
    ("/artifacts/read", T | {"path": "missing"}, 404, "missing"),
    ("/artifacts/read", READ | {"trajectory_id": "nobody"}, 404, "trajectory 'nobody' has no slot"),
    ("/artifacts/list", T | {"path": "/etc"}, 403, "outside of the workspace"),
    ("/artifacts/list", T | {"path": "file"}, 404, "file: Not a directory"),
    ("/artifacts/list", T | {"recursive": "yes"}, 400, "field 'recursive': Input should be a valid boolean"),
    ("/artifacts/list", T | {"max_entries": -1}, 400, "field 'max_entries' must be"),
    ("/artifacts/archive", T | {"format": "zip"}, 400, "field 'format': Input should be 'tar.gz' or 'tgz'"),
    ("/artifacts/archive", T | {"path": ".."}, 403, "outside of the workspace"),
    ("/artifacts/archive", T | {"max_bytes": 1}, 413, "the archive has more than 1 bytes"),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("route", "body", "status", "words"), BAD_REQUESTS)
async def test_a_bad_request_is_refused_with_the_reason(
    client: Client, route: str, body: object, status: int, words: str
) -> None:
    await client.post("/execute", call("test -e file || { printf abc > file; ln -s /etc out; }"))
    given, answer = await client.post(route, body)
    assert (given, set(answer)) == (status, {"kind", "error"}), answer
    assert words in answer["error"]
    # Nothing was lost of it.
    assert (await client.post("/execute", call("cat file")))[1]["output"] == "abc"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", "ü"])
async def test_without_the_token_nothing_is_answered(client: Client, token: str) -> None:
    routes = [("GET", "/status"), ("GET", "/health"), ("GET", "/"), ("POST", "/execute"), ("POST", "/release")]
    for method, route in [*routes, *(("POST", f"/artifacts/{name}") for name in ("read", "list", "archive"))]:
        status, answer = await client.ask(method, route, EXECUTE, token=token)
        assert (status, answer["kind"]) == (401, "unauthorized")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("method", "route"), [("GET", "/execute"), ("POST", "/status"), ("GET", "/"), ("POST", "/reset"), ("PUT", "/release")]
)
async def test_there_are_no_other_routes(client: Client, method: str, route: str) -> None:
    assert await client.ask(method, route, {}) == (404, {"kind": "not_found", "error": f"no route {method} {route}"})


async def test_an_idle_trajectory_loses_its_slot(tmp_path: Path) -> None:
    async with serving(tmp_path, idle_timeout_s=1.5) as client:
        assert (await client.post("/execute", call("touch file; sleep 2; ls")))[1]["output"] == "file\n"
        assert (await client.post("/artifacts/list", T))[0] == 200
        await client.until("/status", lambda status: status["pool"]["slots_in_use"] == 0)
        assert (await client.post("/artifacts/list", T))[0] == 404
        assert (await client.post("/execute", call("ls")))[1]["output"] == ""


async def test_trajectories_that_find_no_slot_are_told_and_others_go_on(tmp_path: Path) -> None:
    async with serving(tmp_path, acquire_timeout_s=1.5) as client:
        for name in ("a", "b"):
            await client.post("/execute", call("true", name))
        status, answer = await client.post("/execute", call("true", "c"))
        assert (status, answer["kind"]) == (503, "no_slot")
        assert "acquire_timeout_s=1.5" in answer["error"]
        assert (await client.post("/execute", call("echo a", "a")))[0] == 200
        await client.post("/release", {"trajectory_id": "a"})
        assert (await client.post("/execute", call("echo c", "c")))[1]["output"] == "c\n"


async def test_a_lost_slot_is_told_and_the_next_call_has_a_fresh_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.post("/execute", call("touch file"))
        for process in below(os.getpid()):
            if "sandbox_image.server" in process.command:
                os.kill(process.pid, signal.SIGKILL)
        refused = set()
        async with asyncio.timeout(PATIENCE_S):
            while (answer := await client.post("/execute", call("ls; echo here")))[0] != 200:
                refused.add((answer[0], answer[1]["kind"]))
                await asyncio.sleep(0.05)
        assert answer[1]["output"] == "here\n"
        assert refused <= {(409, "slot_lost"), (503, "sandbox_unavailable")}
        assert refused


async def test_a_release_ends_the_call_that_runs(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        call_under_way = asyncio.create_task(client.post("/execute", call("sleep 100", timeout=200)))
        await client.until("/status", lambda status: status["calls_running"] == 1)
        await client.post("/release", T)
        status, answer = await call_under_way
        assert (status, answer["kind"]) == (409, "slot_lost")


# --- the process -------------------------------------------------------------------------------------------------------


async def test_the_process_ends_in_order(tmp_path: Path) -> None:
    variables = {"TOOL_EXECUTOR_TOKEN": TOKEN, "TOOL_EXECUTOR_SLOTS": "1", "TOOL_EXECUTOR_PORT": "0"}
    async with running(MODULE, "--local-data-dir", str(tmp_path), token=TOKEN, **variables) as service:
        assert (await service.client.post("/execute", call("echo hi")))[1]["output"] == "hi\n"
        assert (await service.client.get("/status"))[1]["pool"]["slots"] == 1
        call_under_way = asyncio.create_task(service.client.post("/execute", call("sleep 100")))
        await service.client.until("/status", lambda status: status["calls_running"] == 1)
        status, said = await service.end()
        assert status == 0
        assert "Traceback" not in said
        answered, answer = await call_under_way
        assert (answered, answer["kind"]) == (409, "slot_lost")
    assert os.listdir(tmp_path) == []
    assert not mentioning(str(tmp_path))


@pytest.mark.parametrize("flag", [True, False], ids=["flags", "variables"])
async def test_a_backend_of_another_package_with_options_of_its_own(tmp_path: Path, flag: bool) -> None:
    given = {"tool_pool_mode": "tests.support.other_backend:OtherBackend", "other_file": str(tmp_path / "trace")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()] if flag else []
    variables = {} if flag else {f"TOOL_EXECUTOR_{name.upper()}": value for name, value in given.items()}
    async with running(MODULE, "--local-slots=1", *flags, token="", **variables) as service:
        assert (await service.client.post("/execute", call("echo hi")))[1]["output"] == "hi\n"
        assert (tmp_path / "trace").read_text() == "started"
        assert (await service.end())[0] == 0


async def test_the_process_offers_the_tools_of_a_tool_server(tmp_path: Path) -> None:
    flags = ("--port", "0", "--tools", "hermes_envs.tools.sha256:TOOLS")
    async with running("hermes_envs.tool_server", *flags, token="s", TOOL_SERVER_TOKEN="s") as tools:
        variables = {
            "TOOL_EXECUTOR_LOCAL_DATA_DIR": str(tmp_path),
            "TOOL_EXECUTOR_TOOL_SERVER_URL": tools.client.url,
            "TOOL_EXECUTOR_TOOL_SERVER_TOKEN": "s",
        }
        async with running(MODULE, "--port", "0", token="", **variables) as service:
            request = {"trajectory_id": "t", "tool": "sha256", "args": {"text": "hi"}}
            assert (await service.client.post("/execute", request))[1]["output"].startswith("8f434346")
            await tools.end()
            status, answer = await service.client.post("/execute", request)
            assert (status, answer["kind"]) == (502, "tool_server_failed")
            assert (await service.client.post("/execute", call("echo here")))[1]["output"] == "here\n"
            assert (await service.end())[0] == 0


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        (("--host", "0.0.0.0"), {}, "token: one is needed to listen at '0.0.0.0'"),
        (("--host", "example.invalid"), {}, "token: one is needed"),
        (("--local-slots", "0"), {}, "local_slots: Input should be greater than or equal to 1"),
        ((), {"TOOL_EXECUTOR_SLOTS": "many"}, "TOOL_EXECUTOR_SLOTS: Input should be a valid integer"),
        ((), {"TOOL_EXECUTOR_SLOT": "1"}, "TOOL_EXECUTOR_SLOT: there is no such option; known: TOOL_EXECUTOR_ACQUIRE"),
        ((), {"TOOL_EXECUTOR_TOOL_POOL_MODE": "nomad"}, "'nomad' is not available in this version; available: local"),
        (("--enabled-toolsets", "browser"), {}, "enabled_toolsets: unknown toolset 'browser'"),
        (("--local-isolation", "none"), {}, "require_sandbox"),
        (("--tool-server-url", "inprocess"), {}, "tool_server_url: 'inprocess' needs"),
        (("--tool-server-url", "http://127.0.0.1:9"), {}, "the tool server http://127.0.0.1:9 cannot be reached"),
    ],
)
async def test_what_cannot_work_is_named(flags: tuple[str, ...], variables: dict[str, str], words: str) -> None:
    with pytest.raises((ConfigError, BackendConfigError, ToolServerError), match=re.escape(words)):
        await serve(ToolExecutorServerOptions.read("", flags, variables, ALIASES))


async def test_the_process_says_it_in_one_line() -> None:
    status, said = await refusal(MODULE, TOOL_EXECUTOR_TOOL_POOL_MODE="nomad")
    assert (status, said) == (1, "error: tool_pool_mode: 'nomad' is not available in this version; available: local\n")


def test_flags_win_over_variables_and_an_empty_variable_is_none() -> None:
    def read(*flags: str, **variables: str) -> ToolExecutorServerOptions:
        return ToolExecutorServerOptions.read("", flags, variables, ALIASES)

    options = read("--local-slots", "3", TOOL_EXECUTOR_LOCAL_SLOTS="5", TOOL_EXECUTOR_TOKEN="", UNRELATED="1")
    assert (options.local_slots, options.token, options.port) == (3, None, 9001)
    assert read(TOOL_EXECUTOR_LOCAL_SLOTS="5", TOOL_EXECUTOR_SLOTS="6").local_slots == 6
    assert read(TOOL_EXECUTOR_LOCAL_SLOTS="5", TOOL_EXECUTOR_SLOTS="").local_slots == 5
    assert read(TOOL_EXECUTOR_ENABLED_TOOLSETS="terminal, filesystem").enabled_toolsets == ["terminal", "filesystem"]
    assert read("--allow-network", "true").allow_network
    assert "secret" not in repr(read(TOOL_EXECUTOR_TOKEN="secret", TOOL_EXECUTOR_TOOL_SERVER_TOKEN="secret"))
    with pytest.raises(ConfigError, match="idle_timeout_s"):
        read("--idle-timeout-s", "0")
