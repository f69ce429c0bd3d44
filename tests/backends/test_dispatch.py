"""How calls travel: alone at once, together within a window, never more requests than slots."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from backends.dispatch import Dispatcher
from backends.errors import SandboxProtocolError, SlotLostError
from sandbox_image.protocol import ExecuteRequest

Start = Callable[..., Awaitable[Any]]


def request(name: str, slot: int = 0) -> ExecuteRequest:
    return ExecuteRequest(f"slot_{slot}", "bash", {"command": name}, execution_id=name, timeout=5.0)


def result(call: dict[str, Any]) -> dict[str, Any]:
    return {"success": True, "output": call["args"]["command"], "execution_id": call["execution_id"]}


class Commands:
    """Answers calls like a server whose commands end when the test says so; those of one slot run side by side."""

    def __init__(self) -> None:
        self.ends: dict[str, asyncio.Event] = {}
        self.open_requests = 0
        self.most_open_requests = 0
        self._arrivals = asyncio.Semaphore(0)

    def end(self, *names: str) -> None:
        for name in names:
            self.ends.setdefault(name, asyncio.Event()).set()

    async def requests(self, count: int) -> None:
        """Wait until so many more have arrived."""
        for _ in range(count):
            await self._arrivals.acquire()

    async def reply(self, visit: Any) -> None:
        self._arrivals.release()
        self.open_requests += 1
        self.most_open_requests = max(self.most_open_requests, self.open_requests)
        try:
            if visit.route == "/execute":
                await self.ends.setdefault(visit.payload["execution_id"], asyncio.Event()).wait()
                await visit.answer(result(visit.payload))
                return
            await visit.start_stream()
            await asyncio.gather(*(self._line(visit, index, call) for index, call in enumerate(visit.payload)))
            await visit.chunk(b"")
        finally:
            self.open_requests -= 1

    async def _line(self, visit: Any, index: int, call: dict[str, Any]) -> None:
        await self.ends.setdefault(call["execution_id"], asyncio.Event()).wait()
        await visit.line({"index": index, "result": result(call)})


def start(dispatcher: Dispatcher, *requests: ExecuteRequest) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(dispatcher.submit(one)) for one in requests]


WINDOW_S = 0.02


both_windows = pytest.mark.parametrize("window_s", [0.0, WINDOW_S])


@both_windows
async def test_a_call_without_company_travels_alone(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    commands.end("a")
    server = await lying_server(commands.reply)
    assert (await Dispatcher(server.client, window_s=window_s).submit(request("a"))).output == "a"
    assert server.routes == ["/execute"]


@both_windows
async def test_calls_of_the_same_moment_travel_together_and_end_on_their_own(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    slow, fast, third = start(
        Dispatcher(server.client, window_s=window_s), request("slow", 0), request("fast", 1), request("third", 2)
    )
    commands.end("fast")
    assert (await fast).output == "fast"
    assert (slow.done(), server.routes) == (False, ["/batch"])
    commands.end("slow", "third")
    assert [(await call).output for call in (slow, third)] == ["slow", "third"]


async def test_a_window_is_how_long_a_call_waits_for_company(lying_server: Start) -> None:
    commands = Commands()
    commands.end("a", "b")
    for window_s, routes in ((0.0, ["/execute", "/execute"]), (1.0, ["/batch"])):
        server = await lying_server(commands.reply)
        dispatcher = Dispatcher(server.client, window_s=window_s)
        (first,) = start(dispatcher, request("a", 0))
        await asyncio.sleep(0.05)
        (second,) = start(dispatcher, request("b", 1))
        assert [(await first).output, (await second).output] == ["a", "b"]
        assert server.routes == routes


@both_windows
async def test_calls_of_one_slot_take_turns(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client, window_s=window_s)
    (first,) = start(dispatcher, request("first"))
    await asyncio.sleep(0.1)
    later = start(dispatcher, *(request(f"later {number}") for number in range(3)), request("other", 1))
    commands.end("other", *(f"later {number}" for number in range(3)))
    assert (await later[3]).output == "other"
    assert [visit.payload["execution_id"] for visit in server.visits] == ["first", "other"]
    commands.end("first")
    assert [(await call).output for call in [first, *later[:3]]] == ["first", "later 0", "later 1", "later 2"]
    assert [visit.payload["execution_id"] for visit in server.visits[2:]] == ["later 0", "later 1", "later 2"]


@both_windows
async def test_there_are_never_more_requests_than_slots(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    names = [str(number) for number in range(100)]
    commands.end(*names)
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client, window_s=window_s, max_batch_size=7)
    calls = []
    for name in names:
        calls += start(dispatcher, request(name, int(name) % 9))
        if int(name) % 3 == 0:
            await asyncio.sleep(0)
    assert [(await call).output for call in calls] == names
    assert commands.most_open_requests <= 9
    batches = [len(visit.payload) for visit in server.visits if visit.route == "/batch"]
    assert 1 < max(batches) <= 7


async def test_a_batch_never_grows_beyond_its_bytes(lying_server: Start) -> None:
    commands = Commands()
    commands.end("a", "b", "c")
    server = await lying_server(commands.reply)
    big = [
        ExecuteRequest(f"slot_{slot}", "write_file", {"command": "x" * 5_000_000}, execution_id=name, timeout=30.0)
        for slot, name in enumerate("abc")
    ]
    await asyncio.gather(*start(Dispatcher(server.client, window_s=WINDOW_S), *big))
    assert server.routes == ["/execute"] * 3


async def test_what_a_broken_batch_has_not_brought_is_asked_for_alone(lying_server: Start) -> None:
    commands = Commands()

    async def reply(visit: Any) -> None:
        if visit.route == "/batch":
            await visit.start_stream()
            await visit.line({"index": 1, "result": result(visit.payload[1])})
            visit.hang_up()
        else:
            await commands.reply(visit)

    commands.end("a", "b", "c")
    server = await lying_server(reply)
    dispatcher = Dispatcher(server.client, window_s=WINDOW_S)
    calls = start(dispatcher, *(request(name, slot) for slot, name in enumerate("abc")))
    assert [(await call).output for call in calls] == ["a", "b", "c"]
    assert server.routes[0] == "/batch"
    assert sorted(visit.payload["execution_id"] for visit in server.visits[1:]) == ["a", "c"]


async def test_a_batch_that_is_refused_is_sent_call_by_call(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        if visit.route == "/batch" or visit.payload["execution_id"] == "bad":
            await visit.answer({"kind": "bad_request", "error": "the reason"}, status=400)
        else:
            await visit.answer(result(visit.payload))

    server = await lying_server(reply)
    dispatcher = Dispatcher(server.client, window_s=WINDOW_S)
    good, bad, other = start(dispatcher, request("good", 0), request("bad", 1), request("other", 2))
    assert [(await good).output, (await other).output] == ["good", "other"]
    with pytest.raises(SandboxProtocolError, match="the reason"):
        await bad


async def test_a_batch_that_makes_no_sense_is_an_error_of_all_its_calls(lying_server: Start) -> None:
    async def reply(visit: Any) -> None:
        await visit.start_stream()
        await visit.line({"index": 7, "result": {}})

    server = await lying_server(reply)
    calls = start(Dispatcher(server.client, window_s=WINDOW_S), request("a", 0), request("b", 1))
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, SandboxProtocolError)
    assert server.routes == ["/batch"]


@both_windows
async def test_a_cancelled_caller_leaves_the_others_alone(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client, window_s=window_s)
    calls = start(dispatcher, *(request(name, slot) for slot, name in enumerate("abc")))
    await commands.requests(1)
    calls[1].cancel()
    await asyncio.wait([calls[1]])
    commands.end("a", "c")
    assert [(await calls[0]).output, (await calls[2]).output] == ["a", "c"]
    # The slot of the cancelled call is free for the next one.
    commands.end("next")
    assert (await dispatcher.submit(request("next", 1))).output == "next"
    commands.end("b")


async def test_a_caller_who_leaves_while_the_window_is_open_sends_nothing(lying_server: Start) -> None:
    commands = Commands()
    commands.end("a", "b", "c")
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client, window_s=WINDOW_S)
    calls = start(dispatcher, *(request(name, slot) for slot, name in enumerate("abc")))
    await asyncio.sleep(0)
    calls[1].cancel()
    assert [(await calls[0]).output, (await calls[2]).output] == ["a", "c"]
    assert [call["execution_id"] for call in server.visits[0].payload] == ["a", "c"]
    (alone,) = start(dispatcher, request("b", 1))
    await asyncio.sleep(0)
    alone.cancel()
    assert (await dispatcher.submit(request("a"))).output == "a"
    assert server.routes == ["/batch", "/execute"]


@both_windows
async def test_a_request_without_callers_is_given_up(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    calls = start(Dispatcher(server.client, window_s=window_s), request("a", 0), request("b", 1))
    await commands.requests(1)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    for visit in server.visits:
        assert await visit.reader.read() == b"", "the client has closed the connection"
    commands.end("a", "b")


@both_windows
async def test_a_request_is_given_up_when_the_last_who_waits_has_its_result(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client, window_s=window_s)
    gone, stays = start(dispatcher, request("a", 0), request("b", 1))
    await commands.requests(1)
    gone.cancel()
    await asyncio.wait([gone])
    commands.end("b")
    assert (await stays).output == "b"
    [visit] = server.visits
    assert await visit.reader.read() == b"", "the client has closed the connection"
    await dispatcher.close(SlotLostError("over"))
    commands.end("a")


async def test_a_call_that_cannot_be_encoded_hurts_nobody(lying_server: Start) -> None:
    commands = Commands()
    commands.end("good")
    server = await lying_server(commands.reply)
    bad = ExecuteRequest("slot_0", "bash", {"command": object()}, execution_id="bad")
    outcomes = await asyncio.gather(*start(Dispatcher(server.client), bad, request("good")), return_exceptions=True)
    assert isinstance(outcomes[0], SandboxProtocolError)
    assert outcomes[1].output == "good"


@both_windows
async def test_failing_ends_all_calls_at_once(lying_server: Start, window_s: float) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client, window_s=window_s)
    calls = start(dispatcher, request("a", 0), request("b", 1))
    await commands.requests(1)
    calls += start(dispatcher, request("waiting", 0))
    await asyncio.sleep(0)
    dispatcher.fail(SlotLostError("it died"))
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, SlotLostError)
    with pytest.raises(SlotLostError, match="it died"):
        await dispatcher.submit(request("late"))
    await dispatcher.close(SlotLostError("it died"))
    assert "waiting" not in str([visit.payload for visit in server.visits])
    commands.end("a", "b")
