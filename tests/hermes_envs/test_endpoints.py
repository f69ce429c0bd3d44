"""Which endpoint gets a request, how many it gets at once, and what is asked again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.errors import ConfigError, EngineError, EngineRefusalError, EngineUnavailableError, InexactRolloutError
from hermes_envs.policies.chat_endpoint import ChatEndpoint
from hermes_envs.policies.endpoints import Endpoints
from hermes_envs.policies.token_endpoint import TokenEndpoint
from tests.engine.chat import Answer, ChatServer, completion
from tests.engine.engine import Engine
from tests.engine.servers import policy_for
from tests.engine.speech import says

QUESTION = [{"role": "user", "content": "List the files."}]


@asynccontextmanager
async def endpoints_at(
    *servers: ChatServer, patience_s: float = 300.0, **config: Any
) -> AsyncIterator[Endpoints[ChatEndpoint]]:
    options = {"health_check": False, "timeout": 30, "model_name": "tiny"} | config
    configs = [APIServerConfig(base_url=server.base_url, **options) for server in servers]
    endpoints = Endpoints((ChatEndpoint(one) for one in configs), patience_s)
    try:
        yield endpoints
    finally:
        await endpoints.aclose()


async def ask(endpoints: Endpoints[ChatEndpoint]) -> dict[str, Any]:
    return await endpoints.ask(lambda endpoint: endpoint.complete({}))


def status(code: int, retry_after: str = "0.01") -> Answer:
    return lambda _: web.Response(status=code, text="no", headers={"Retry-After": retry_after})


# --- what is asked again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "requests"),
    [
        (status(400), EngineRefusalError, 1),
        (status(401), EngineRefusalError, 1),
        (status(404), EngineRefusalError, 1),
        (status(429), EngineUnavailableError, 3),
        (status(500), EngineUnavailableError, 3),
        (status(503), EngineUnavailableError, 3),
        (lambda _: web.Response(text="<html>"), EngineError, 1),
        (lambda _: [], EngineError, 1),
    ],
)
async def test_only_what_passes_by_itself_is_asked_again(answer: Answer, error: type[EngineError], requests: int) -> None:
    async with ChatServer(answer) as server, endpoints_at(server) as endpoints:
        with pytest.raises(EngineError) as caught:
            await ask(endpoints)

    assert type(caught.value) is error
    assert len(server.requests) == requests


async def test_an_endpoint_that_does_not_answer_in_time_is_asked_once() -> None:
    async with ChatServer(completion(), delay_s=20) as server, endpoints_at(server, timeout=1) as endpoints:
        with pytest.raises(EngineError, match="did not answer within 1 s") as caught:
            await ask(endpoints)

    assert caught.value.retryable
    assert len(server.requests) == 1


async def test_an_inexact_answer_is_asked_for_once(tokenizer: PreTrainedTokenizerFast) -> None:
    def mangle(reply: dict[str, Any]) -> dict[str, Any]:
        return reply | {"meta_info": reply["meta_info"] | {"prompt_tokens": 5}}

    async with Engine(tokenizer, "sglang", says(tokenizer, "ok<|im_end|>"), mangle) as engine:
        with pytest.raises(InexactRolloutError) as caught:
            await policy_for(engine, tokenizer).start("t", tools=[]).respond(QUESTION)

    assert not caught.value.retryable
    assert len(engine.requests) == 1


async def test_an_aborted_request_is_sent_again(tokenizer: PreTrainedTokenizerFast) -> None:
    """As when an engine takes new weights in the midst of it."""
    reasons: list[Any] = [{"type": "abort"}, {"type": "stop"}]

    def mangle(reply: dict[str, Any]) -> dict[str, Any]:
        return reply | {"meta_info": reply["meta_info"] | {"finish_reason": reasons.pop(0)}}

    async with Engine(tokenizer, "sglang", says(tokenizer, "ok<|im_end|>"), mangle) as engine:
        turn = await policy_for(engine, tokenizer).start("t", tools=[]).respond(QUESTION)

    assert turn.message["content"] == "ok"
    assert engine.requests[0] == engine.requests[1]


async def test_the_server_says_how_long_to_wait() -> None:
    async with ChatServer(status(429, "1.2"), completion()) as server, endpoints_at(server) as endpoints:
        started = time.monotonic()
        await ask(endpoints)

    assert time.monotonic() - started >= 1.2
    assert len(server.requests) == 2


# --- where requests go -------------------------------------------------------------------------------------------------


async def test_connections_are_kept_until_the_endpoints_are_closed() -> None:
    async with ChatServer(completion(), delay_s=0.05) as server:
        async with endpoints_at(server) as endpoints:
            for _ in range(5):
                await asyncio.gather(ask(endpoints), ask(endpoints))
            assert len(server.connections) == 2
        async with endpoints_at(server) as endpoints:
            await ask(endpoints)
            assert len(server.connections) == 3


async def test_an_endpoint_that_has_failed_is_left_alone_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    async with ChatServer(status(500)) as broken, ChatServer(completion()) as sound, endpoints_at(broken, sound) as endpoints:
        for _ in range(10):
            await ask(endpoints)

    assert (len(broken.requests), len(sound.requests)) == (1, 10)
    assert caplog.text.count("asking again") == 1


async def test_every_endpoint_is_asked_before_a_request_is_given_up() -> None:
    async with ChatServer(completion()) as one, ChatServer(completion()) as two, ChatServer(completion()) as three:
        await one.stop()
        await two.stop()
        async with ChatServer(completion()) as four:
            await three.stop()
            async with endpoints_at(one, two, three, four) as endpoints:
                await ask(endpoints)

    assert len(four.requests) == 1


async def test_a_trainers_weight_limits_the_requests_at_once() -> None:
    async def most_at_once(weight: float) -> int:
        async with ChatServer(completion(), delay_s=0.05) as server:
            async with endpoints_at(server, num_max_requests_at_once=8) as endpoints:
                endpoints.limit_requests(weight)
                await asyncio.gather(*(ask(endpoints) for _ in range(12)))
            assert len(server.requests) == 12
            return server.at_once

    assert [await most_at_once(weight) for weight in (1.0, 0.5, 0.3, 0.001)] == [8, 4, 3, 1]


async def test_a_weight_that_grows_lets_waiting_requests_go() -> None:
    async with ChatServer(completion(), delay_s=0.3) as server, endpoints_at(server, num_max_requests_at_once=4) as endpoints:
        endpoints.limit_requests(0.25)
        requests = [asyncio.create_task(ask(endpoints)) for _ in range(4)]
        while not server.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        endpoints.limit_requests(1.0)
        await asyncio.gather(*requests)

    assert server.at_once == 4


async def test_requests_that_wait_go_in_the_order_in_which_they_came() -> None:
    done: list[int] = []

    async def numbered(endpoints: Endpoints[ChatEndpoint], number: int) -> None:
        await endpoints.ask(lambda endpoint: endpoint.complete({"number": number}))
        done.append(number)

    async with ChatServer(completion(), delay_s=0.01) as server, endpoints_at(server, num_max_requests_at_once=1) as endpoints:
        requests = [asyncio.create_task(numbered(endpoints, number)) for number in range(8)]
        await asyncio.sleep(0)
        # One that is given up takes no place with it, wherever it stands.
        for number in (0, 3):
            requests[number].cancel()
        await asyncio.gather(*requests, return_exceptions=True)

    assert done == [1, 2, 4, 5, 6, 7]


# --- health ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [502, 503, 504])
async def test_requests_wait_for_an_engine_that_is_away(code: int) -> None:
    answers = [*[status(code)] * 9, completion(content="ok")]
    async with ChatServer(*answers) as server, endpoints_at(server, health_check=True) as endpoints:
        reply = await ask(endpoints)

    assert reply["choices"][0]["message"]["content"] == "ok"
    assert len(server.requests) == 10


@pytest.mark.parametrize("code", [429, 500])
async def test_requests_do_not_wait_for_an_engine_that_is_there(code: int) -> None:
    async with ChatServer(status(code)) as server, endpoints_at(server, health_check=True) as endpoints:
        with pytest.raises(EngineUnavailableError):
            await ask(endpoints)

    assert len(server.requests) == 3


async def test_an_engine_that_comes_back_is_found(caplog: pytest.LogCaptureFixture) -> None:
    async with ChatServer(completion()) as server, endpoints_at(server, health_check=True) as endpoints:
        await server.stop()
        request = asyncio.create_task(ask(endpoints))
        while not caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await server.start()
        await request

    assert len(server.requests) == 1


async def test_all_who_wait_give_up_when_the_patience_ends() -> None:
    async with ChatServer(completion()) as server, endpoints_at(server, health_check=True, patience_s=1.5) as endpoints:
        await server.stop()
        started = time.monotonic()
        errors = await asyncio.gather(*(ask(endpoints) for _ in range(30)), return_exceptions=True)
        took = time.monotonic() - started

    assert {type(error) for error in errors} == {EngineUnavailableError}
    assert all(server.base_url in str(error) for error in errors)
    assert 1.5 <= took < 30 * 1.5 / 2, "they have waited together, not one after the other"


# --- what is told ------------------------------------------------------------------------------------------------------


async def test_it_is_measured_how_long_requests_take() -> None:
    async with ChatServer(completion(), delay_s=0.1) as server, endpoints_at(server) as endpoints:
        assert endpoints.metrics() == {}
        await ask(endpoints)
        metrics = endpoints.metrics()

    assert set(metrics) == {f"server/server_0_request_time_{kind}" for kind in ("avg", "std", "99p")}
    assert metrics["server/server_0_request_time_avg"] >= 0.1


@asynccontextmanager
async def listening(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """The address of a server that answers anything."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_key_is_sent_to_whoever_needs_one() -> None:
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response(completion())

    async with listening(answer) as address:
        for key in ("secret", "", None):
            async with aclosing(ChatEndpoint(APIServerConfig(base_url=f"{address}/v1/", api_key=key))) as endpoint:
                await endpoint.complete({})

    assert seen == ["Bearer secret", None, None]


async def test_chat_endpoints_are_asked_through_a_proxy_and_engines_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers["Host"])
        return web.json_response(completion())

    async with listening(answer) as address:
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("no_proxy", "internal.invalid")
        async with aclosing(ChatEndpoint(APIServerConfig(base_url="http://chat.invalid/v1"))) as endpoint:
            await endpoint.complete({})
        excepted = ChatEndpoint(APIServerConfig(base_url="http://internal.invalid/v1"))
        engine = TokenEndpoint(APIServerConfig(base_url="http://engine.invalid/v1", server_type="vllm"))
        for direct in (excepted, engine):
            async with aclosing(direct):
                with pytest.raises(EngineUnavailableError, match=r"Cannot connect to host \w+\.invalid"):
                    await direct.post(direct.address, {})

    assert seen == ["chat.invalid"]


@pytest.mark.parametrize("address", ["", None, "localhost:8000/v1", "ftp://localhost/v1"])
def test_what_is_no_address_is_a_fault_of_the_config(address: str | None) -> None:
    with pytest.raises(ConfigError, match=r"openai\.base_url: "):
        ChatEndpoint(APIServerConfig(base_url=address))
