from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from atroposlib.envs.server_handling.server_baseline import APIServerConfig

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.policies import PolicyOptions, create_policy
from hermes_envs.policies.base import ContextFullError, Conversation, SamplingOptions, Turn
from hermes_envs.policies.endpoint import REPLY_LIMIT_BYTES
from hermes_envs.policies.messages import MessagesPolicy
from tests.engine.chat import Answer, ChatServer, completion
from tests.support.waiting import PATIENCE_S

QUESTION = [{"role": "system", "content": "You are careful."}, {"role": "user", "content": "List the files."}]
BASH = [
    {"type": "function", "function": {"name": "bash", "description": "", "parameters": {"type": "object", "properties": {}}}}
]


def config_for(base_url: str, *, timeout_s: int = 30, at_once: int = 512) -> APIServerConfig:
    return APIServerConfig(base_url=base_url, model_name="tiny", timeout=timeout_s, num_max_requests_at_once=at_once)


@asynccontextmanager
async def talking_to(
    *answers: Answer | dict[str, Any], timeout_s: int = 30, **options: Any
) -> AsyncIterator[tuple[Conversation, ChatServer]]:
    async with ChatServer(*answers) as server:
        policy = MessagesPolicy([config_for(server.base_url, timeout_s=timeout_s)], SamplingOptions(**options))
        try:
            yield policy.start("t", tools=BASH), server
        finally:
            await policy.aclose()


async def answer_to(reply: Answer | dict[str, Any]) -> Turn:
    async with talking_to(reply) as (conversation, _):
        return await conversation.respond(QUESTION)


def native(arguments: object, *, name: object = "bash", id: object = "c1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


# --- what is sent ------------------------------------------------------------------------------------------------------


async def test_the_conversation_is_sent_whole_with_the_tools() -> None:
    said = completion("tool_calls", content="I look.", tool_calls=[native('{"command": "ls"}')])
    async with talking_to(said, completion(content="One file."), agent_temperature=0.2, agent_max_tokens=77) as (talk, server):
        first = await talk.respond(QUESTION)
        result = {"role": "tool", "tool_call_id": "c1", "name": "bash", "content": "a.py"}
        second = await talk.respond([result])

    assert first.finish_reason == "tool_calls"
    assert (second.message, second.finish_reason) == ({"role": "assistant", "content": "One file."}, "stop")
    assert server.requests[0] == {
        "model": "tiny",
        "messages": QUESTION,
        "tools": BASH,
        "temperature": 0.2,
        "max_tokens": 77,
    }
    assert first.message["tool_calls"] == [native({"command": "ls"})]
    said = {"role": "assistant", "content": "I look.", "tool_calls": [native('{"command": "ls"}')]}
    assert server.requests[1]["messages"] == [*QUESTION, said, result]
    assert talk.record.engine_calls == 2
    assert talk.record.segments == [], "no tokens are known and none are made up"


async def test_a_limit_or_tools_that_there_are_not_are_not_sent() -> None:
    async with ChatServer(completion(content="ok")) as server:
        policy = create_policy(PolicyOptions(policy="messages"), [config_for(server.base_url)])
        await policy.start("t", tools=[]).respond(QUESTION)
        await policy.aclose()

    assert not policy.exact
    assert set(server.requests[0]) == {"model", "messages", "temperature"}


async def test_malformed_arguments_go_back_as_valid_json() -> None:
    said = completion("tool_calls", tool_calls=[native('{"command": '), native('{"command": "ls"}', id="c2")])
    async with talking_to(said) as (talk, server):
        turn = await talk.respond(QUESTION)
        await talk.respond([{"role": "tool", "tool_call_id": "c1", "content": turn.tool_calls[0].error}])

    assert [call.arguments for call in turn.tool_calls] == [None, {"command": "ls"}]
    assert turn.message["tool_calls"][0]["function"]["arguments"] == '{"command": '
    sent = server.requests[1]["messages"][2]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in sent] == [{"malformed": '{"command": '}, {"command": "ls"}]


# --- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"command": "ls"}', {"command": "ls"}),
        ({"command": "ls"}, {"command": "ls"}),
        ("", {}),
        (None, {}),
        ("{}", {}),
    ],
)
async def test_arguments_come_as_text_as_an_object_or_not_at_all(arguments: object, parsed: dict[str, Any]) -> None:
    turn = await answer_to(completion("tool_calls", content=None, tool_calls=[native(arguments)]))

    [call] = turn.tool_calls
    assert (call.id, call.name, call.arguments, call.error) == ("c1", "bash", parsed, None)
    assert turn.message["content"] == ""


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (native("ls -la"), "not valid JSON"),
        (native("[1]"), "must be a JSON object, not list"),
        (native(5), "must be a JSON object, not int"),
        (native("[" * 100_000), "not valid JSON"),
        (native("{}", name=None), "does not name a tool"),
        (native("{}", name=["bash"]), "does not name a tool"),
        ({"id": "c1"}, "has no function"),
        ("bash ls", "has no function"),
    ],
)
async def test_a_malformed_call_stands_with_its_fault_beside_the_good_ones(call: object, complaint: str) -> None:
    turn = await answer_to(completion("tool_calls", tool_calls=[call, native("{}", id="good")]))

    broken, good = turn.tool_calls
    assert broken.error is not None
    assert complaint in broken.error
    assert (good.arguments, good.error) == ({}, None)


async def test_one_call_may_come_without_a_list() -> None:
    turn = await answer_to(completion("tool_calls", tool_calls=native("{}")))

    assert [call.name for call in turn.tool_calls] == ["bash"]


async def test_calls_without_ids_or_with_the_same_get_their_own() -> None:
    calls = [native("{}", id=None), native("{}", id=""), native("{}", id="x"), native("{}", id="x"), native("{}", id=7)]
    async with talking_to(completion("tool_calls", tool_calls=calls)) as (talk, _):
        first = await talk.respond(QUESTION)
        second = await talk.respond([{"role": "user", "content": "again"}])

    ids = [call.id for call in (*first.tool_calls, *second.tool_calls)]
    assert len(set(ids)) == len(ids) == 10
    assert "x" in ids
    assert [call["id"] for call in second.message["tool_calls"]] == ids[5:]


async def test_calls_written_as_text_are_understood_and_answered_as_text() -> None:
    written = (
        "<think>\n<tool_call>a draft</tool_call>\n</think>\nI look.\n"
        '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "bash", "arguments": }\n</tool_call>\n<tool_call>["bash"]</tool_call>\n<tool_call>{"name"'
    )
    async with talking_to(completion(content=written)) as (talk, server):
        turn = await talk.respond(QUESTION)
        await talk.respond(
            [{"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "a.py"} for call in turn.tool_calls]
        )

    assert [call.arguments for call in turn.tool_calls] == [{"command": "ls"}, None, None, None]
    faults = [call.error or "" for call in turn.tool_calls]
    assert "is not valid JSON" in faults[1]
    assert "is not a JSON object" in faults[2]
    assert "was not closed" in faults[3]
    assert (turn.finish_reason, turn.message["content"]) == ("tool_calls", "I look.")
    assert turn.message["reasoning_content"] == "<tool_call>a draft</tool_call>"
    # An endpoint that wrote calls as text has no native ones: it gets text back.
    history = server.requests[1]["messages"][2:]
    assert history[0] == {"role": "assistant", "content": written}
    assert history[1:] == [{"role": "user", "content": "<tool_response>\na.py\n</tool_response>"}] * 4


async def test_native_calls_stand_even_if_the_text_speaks_of_others() -> None:
    turn = await answer_to(completion(content='<tool_call>{"name": "x"}</tool_call>', tool_calls=[native("{}")]))

    assert [call.name for call in turn.tool_calls] == ["bash"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_reasoning_is_kept_in_the_transcript_and_not_sent_back(field: str) -> None:
    async with talking_to(completion(content="Hm.", **{field: "Files?"})) as (talk, server):
        turn = await talk.respond(QUESTION)
        await talk.respond([{"role": "user", "content": "And?"}])

    assert turn.message == {"role": "assistant", "content": "Hm.", "reasoning_content": "Files?"}
    assert server.requests[1]["messages"][2] == {"role": "assistant", "content": "Hm."}


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": ""}, {"content": [], "tool_calls": []}])
async def test_a_model_may_say_nothing(message: dict[str, Any]) -> None:
    turn = await answer_to(completion(**message))

    assert (turn.message, turn.tool_calls, turn.finish_reason) == ({"role": "assistant", "content": ""}, (), "stop")


async def test_content_may_come_in_parts() -> None:
    turn = await answer_to(completion(content=[{"type": "text", "text": "one "}, {"type": "text", "text": "two"}, "!"]))

    assert turn.message["content"] == "one two!"


async def test_a_cut_answer_is_known_as_such() -> None:
    turn = await answer_to(completion("length", content="", tool_calls=[native('{"command": "ls')]))

    assert turn.finish_reason == "length"
    assert turn.tool_calls[0].error


async def test_text_that_no_file_can_hold_is_replaced() -> None:
    body = json.dumps(completion(content="a\ud800b", tool_calls=[native('{"command": "\udfff"}')])).encode()
    broken = body.replace(b"tiny", b"\xff\xfe")

    turn = await answer_to(lambda _: web.Response(body=broken, content_type="application/json"))

    assert turn.message["content"] == "a\ufffdb"
    assert turn.tool_calls[0].arguments == {"command": "\ufffd"}
    json.dumps(turn.message, ensure_ascii=False).encode()


async def test_megabytes_are_an_answer_up_to_a_limit() -> None:
    turn = await answer_to(completion(content="word " * 10**6))
    assert len(turn.message["content"]) == 5 * 10**6

    with pytest.raises(EngineError, match=f"sent more than {REPLY_LIMIT_BYTES} bytes"):
        await answer_to(lambda _: web.Response(body=b"x" * (REPLY_LIMIT_BYTES + 1)))


# --- endpoints that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (lambda _: web.Response(), "sent an empty reply"),
        (
            lambda _: web.Response(text="<html>\nWelcome\n</html>", content_type="text/html"),
            "not answer with JSON: '<html> Welc",
        ),
        (lambda _: web.Response(text='{"choices": [', content_type="application/json"), "did not answer with JSON"),
        (lambda _: web.Response(text="[" * 10**6, content_type="application/json"), "did not answer with JSON"),
        (lambda _: [], "did not answer with a JSON object"),
        (lambda _: {}, "has no message: it has nothing"),
        (lambda _: {"id": 1, "usage": {}}, "has no message: it has 'id', 'usage'"),
        (lambda _: {"choices": []}, "has no message"),
        (lambda _: {"choices": [{"text": "hello"}]}, "has no message"),
        (lambda _: {"error": {"message": "the model is overloaded"}}, "has no message: .*overloaded"),
        (lambda _: web.json_response({"error": {"message": "no such model"}}, status=404), "refused: .*no such model"),
        (lambda _: web.Response(status=401, text="who are you?"), "refused: .*who are you"),
    ],
)
async def test_a_reply_that_is_no_answer_is_the_endpoints_failure(reply: Answer, complaint: str) -> None:
    async with talking_to(reply) as (talk, _):
        with pytest.raises(EngineError, match=complaint) as caught:
            await talk.respond(QUESTION)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert talk.record.engine_calls == 0


async def test_a_passing_failure_is_tried_again() -> None:
    busy = web.Response(status=503, headers={"Retry-After": "0.01"})
    async with talking_to(lambda _: busy, completion(content="ok")) as (talk, server):
        turn = await talk.respond(QUESTION)

    assert turn.message["content"] == "ok"
    assert len(server.requests) == 2


async def test_a_lasting_failure_ends_after_finitely_many_tries() -> None:
    def broken(_: dict[str, Any]) -> web.Response:
        return web.Response(status=500, text="out of memory", headers={"Retry-After": "0.01"})

    async with talking_to(broken) as (talk, server):
        with pytest.raises(EngineError, match=r"refused: .*out of memory"):
            await talk.respond(QUESTION)

    assert len(server.requests) == 3


async def test_a_reply_that_breaks_off_is_the_endpoints_failure() -> None:
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(drop, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    policy = MessagesPolicy([config_for(url)], SamplingOptions())
    async with listener:
        with pytest.raises(EngineError, match="failed: ClientPayloadError"):
            await policy.start("t", tools=[]).respond(QUESTION)
    await policy.aclose()


async def test_an_endpoint_that_is_gone_or_silent_is_named() -> None:
    async with ChatServer(completion(content="late"), delay_s=2 * PATIENCE_S) as silent, ChatServer(completion()) as gone:
        await gone.stop()
        for server, complaint in (
            (silent, "did not answer within 1 s"),
            (gone, "failed: ClientConnectorError: Cannot connect"),
        ):
            policy = MessagesPolicy([config_for(server.base_url, timeout_s=1 if server is silent else 30)], SamplingOptions())
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(EngineError, match=complaint) as caught:
                    await policy.start("t", tools=[]).respond(QUESTION)
            assert server.base_url in str(caught.value)
            await policy.aclose()


@pytest.mark.parametrize(
    "error",
    [
        {"message": "This model's maximum context length is 4096 tokens.", "code": "context_length_exceeded"},
        {"message": "This model's maximum context length is 100 tokens. However, you requested 200 tokens."},
        {"message": "The input (200 tokens) is longer than the model's context length (100 tokens)."},
        {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"},
    ],
)
async def test_a_full_context_ends_the_trajectory_rather_than_failing_it(error: dict[str, Any]) -> None:
    async with talking_to(lambda _: web.json_response({"error": error}, status=400)) as (talk, _):
        with pytest.raises(ContextFullError):
            await talk.respond(QUESTION)


async def test_a_failed_turn_can_be_tried_again() -> None:
    async with talking_to({"choices": []}, completion(content="ok")) as (talk, server):
        with pytest.raises(EngineError):
            await talk.respond(QUESTION)
        await talk.respond(QUESTION)

    assert server.requests[0] == server.requests[1]


# --- several endpoints -------------------------------------------------------------------------------------------------


async def test_the_least_busy_endpoint_is_asked() -> None:
    async with ChatServer(completion(), delay_s=0.2) as one, ChatServer(completion(), delay_s=0.2) as other:
        policy = MessagesPolicy([config_for(one.base_url), config_for(other.base_url)], SamplingOptions())
        await asyncio.gather(*(policy.start(str(number), tools=[]).respond(QUESTION) for number in range(10)))
        await policy.aclose()

    assert (len(one.requests), len(other.requests)) == (5, 5)


async def test_another_endpoint_is_asked_when_one_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    async with ChatServer(completion()) as gone, ChatServer(completion(content="ok")) as alive:
        await gone.stop()
        policy = MessagesPolicy([config_for(gone.base_url), config_for(alive.base_url)], SamplingOptions())
        turn = await policy.start("t", tools=[]).respond(QUESTION)
        await policy.aclose()

    assert turn.message["content"] == "ok"
    assert gone.base_url in caplog.text


async def test_no_more_requests_are_in_flight_than_the_server_takes() -> None:
    async with ChatServer(completion(), delay_s=0.05) as server:
        policy = MessagesPolicy([config_for(server.base_url, at_once=2)], SamplingOptions())
        await asyncio.gather(*(policy.start(str(number), tools=[]).respond(QUESTION) for number in range(8)))
        await policy.aclose()

    assert (server.at_once, len(server.requests)) == (2, 8)


@pytest.mark.parametrize("configs", [[], [APIServerConfig(base_url="")], [APIServerConfig(base_url=None)]])
def test_an_endpoint_without_an_address_is_a_fault_of_the_config(configs: list[APIServerConfig]) -> None:
    with pytest.raises(ConfigError, match=r"openai\.base_url: "):
        MessagesPolicy(configs, SamplingOptions())
