"""How calls travel: alone at once, together when they pile up, never more requests than slots."""

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

    def end(self, *names: str) -> None:
        for name in names:
            self.ends.setdefault(name, asyncio.Event()).set()

    async def reply(self, visit: Any) -> None:
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


async def test_one_call_travels_alone(lying_server: Start) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    commands.end("a")
    assert (await Dispatcher(server.client).submit(request("a"))).output == "a"
    assert server.routes == ["/execute"]


async def test_calls_of_the_same_moment_travel_together_and_end_on_their_own(lying_server: Start) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    slow, fast, third = start(Dispatcher(server.client), request("slow", 0), request("fast", 1), request("third", 2))
    commands.end("fast")
    assert (await asyncio.wait_for(fast, 2)).output == "fast"
    assert (slow.done(), server.routes) == (False, ["/batch"])
    commands.end("slow", "third")
    assert [(await call).output for call in (slow, third)] == ["slow", "third"]


async def test_calls_for_a_busy_slot_pile_up_and_leave_together(lying_server: Start) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client)
    (first,) = start(dispatcher, request("first"))
    await asyncio.sleep(0.05)
    later = start(dispatcher, *(request(f"later {number}") for number in range(3)), request("other", 1))
    commands.end("other", *(f"later {number}" for number in range(3)))
    assert (await asyncio.wait_for(later[3], 2)).output == "other"
    assert server.routes == ["/execute", "/execute"]
    commands.end("first")
    assert [(await call).output for call in [first, *later[:3]]] == ["first", "later 0", "later 1", "later 2"]
    assert server.routes == ["/execute", "/execute", "/batch"]


async def test_there_are_never_more_requests_than_slots(lying_server: Start) -> None:
    commands = Commands()
    names = [str(number) for number in range(200)]
    commands.end(*names)
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client, max_batch_size=7)
    calls = []
    for name in names:
        calls += start(dispatcher, request(name, int(name) % 8))
        if int(name) % 3 == 0:
            await asyncio.sleep(0)
    assert [(await call).output for call in calls] == names
    assert commands.most_open_requests <= 8
    assert max(len(visit.payload) for visit in server.visits if visit.route == "/batch") <= 7


async def test_a_batch_never_grows_beyond_its_bytes(lying_server: Start) -> None:
    commands = Commands()
    commands.end("a", "b", "c")
    server = await lying_server(commands.reply)
    big = [
        ExecuteRequest(f"slot_{slot}", "write_file", {"command": "x" * 5_000_000}, execution_id=name, timeout=5.0)
        for slot, name in enumerate("abc")
    ]
    await asyncio.gather(*start(Dispatcher(server.client), *big))
    assert server.routes == ["/execute"] * 3


async def test_a_cancelled_caller_leaves_the_others_alone(lying_server: Start) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client)
    calls = start(dispatcher, *(request(name, slot) for slot, name in enumerate("abc")))
    await asyncio.sleep(0.05)
    calls[1].cancel()
    await asyncio.sleep(0.05)
    commands.end("a", "c")
    assert [(await calls[0]).output, (await calls[2]).output] == ["a", "c"]
    # The slot of the cancelled call is free for the next one.
    commands.end("next")
    assert (await asyncio.wait_for(dispatcher.submit(request("next", 1)), 2)).output == "next"


async def test_a_flight_without_callers_is_given_up(lying_server: Start) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    calls = start(Dispatcher(server.client), request("a", 0), request("b", 1))
    await asyncio.sleep(0.05)
    for call in calls:
        call.cancel()
    commands.end("a", "b")
    await asyncio.gather(*calls, return_exceptions=True)
    await asyncio.sleep(0.05)
    assert commands.open_requests == 0


async def test_a_call_that_cannot_be_encoded_hurts_nobody(lying_server: Start) -> None:
    commands = Commands()
    commands.end("good")
    server = await lying_server(commands.reply)
    bad = ExecuteRequest("slot_0", "bash", {"command": object()}, execution_id="bad")
    outcomes = await asyncio.gather(*start(Dispatcher(server.client), bad, request("good")), return_exceptions=True)
    assert isinstance(outcomes[0], SandboxProtocolError)
    assert outcomes[1].output == "good"


async def test_failing_ends_all_calls_at_once(lying_server: Start) -> None:
    commands = Commands()
    server = await lying_server(commands.reply)
    dispatcher = Dispatcher(server.client)
    calls = start(dispatcher, request("a", 0), request("b", 1))
    await asyncio.sleep(0.05)
    calls += start(dispatcher, request("waiting", 0))
    await asyncio.sleep(0.05)
    await dispatcher.close(SlotLostError("it died"))
    for outcome in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 1):
        assert isinstance(outcome, SlotLostError)
    with pytest.raises(SlotLostError, match="it died"):
        await dispatcher.submit(request("late"))
    commands.end("a", "b")
