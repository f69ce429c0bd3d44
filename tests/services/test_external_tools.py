from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any

import pytest

from hermes_envs.errors import ConfigError, ToolServerError
from hermes_envs.tools.external import MAX_OUTPUT_CHARS, ExternalTool, ExternalToolbox
from sandbox_image.protocol import ExecutionResult
from tests.support.waiting import until

ANYTHING = {"type": "object"}


async def double(number: int) -> int:
    return 2 * number


async def broken() -> str:
    raise ValueError("no such city")


async def leaving() -> str:
    sys.exit("bye")


async def cancelling() -> str:
    raise asyncio.CancelledError


async def slow() -> str:
    await asyncio.sleep(60)
    return "late"


class Stubborn:
    """A tool that ends when it is let go of, and not when it is cancelled."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def run(self) -> str:
        while not self.let_go.is_set():
            with suppress(asyncio.CancelledError):
                await self.let_go.wait()
        return "late"


async def unspeakable() -> object:
    return object()


async def long() -> str:
    return "x" * (MAX_OUTPUT_CHARS + 5)


async def structured() -> dict[str, Any]:
    return {"temperature": 21.5, "unit": "°C"}


async def greedy(places: list[str]) -> str:
    return places.pop()


def box(*functions: Any, max_concurrency: int = 16, timeout_s: float = 30.0) -> ExternalToolbox:
    tools = [ExternalTool(function.__name__, "", ANYTHING, function, timeout_s) for function in functions]
    return ExternalToolbox(tools, max_concurrency)


async def call(toolbox: ExternalToolbox, name: str, timeout_s: float = 30.0, **arguments: Any) -> ExecutionResult:
    return await toolbox.call(name, arguments, timeout_s, "t")


async def test_a_tool_answers_with_a_text_or_with_json() -> None:
    toolbox = box(double, structured)
    assert (await call(toolbox, "double", number=21)).output == "42"
    assert await call(toolbox, "structured") == ExecutionResult(
        success=True, output='{"temperature": 21.5, "unit": "°C"}', metadata={"timeout": False}
    )


async def test_a_tool_that_changes_its_arguments_changes_no_transcript() -> None:
    places = ["Bern", "Paris"]
    assert (await call(box(greedy), "greedy", places=places)).output == "Paris"
    assert places == ["Bern", "Paris"]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (broken, "ValueError: no such city"),
        (leaving, "SystemExit: bye"),
        (cancelling, "it was cancelled"),
        (unspeakable, "TypeError: Object of type object is not JSON serializable"),
    ],
)
async def test_whatever_a_tool_does_is_a_result(function: Any, error: str) -> None:
    toolbox = box(function, double)
    result = await call(toolbox, function.__name__)
    assert (result.success, result.output, result.error) == (False, "", error)
    assert (await call(toolbox, "double", number=1)).success


async def test_the_shorter_timeout_holds() -> None:
    assert (await call(box(slow), "slow", 0.1)).error == "timed out after 0.1 s"
    result = await call(box(slow, timeout_s=0.2), "slow", 100.0)
    assert (result.error, result.metadata) == ("timed out after 0.2 s", {"timeout": True})


async def test_a_tool_that_does_not_end_keeps_its_place_but_nobody_waiting() -> None:
    stubborn = Stubborn()
    toolbox = box(stubborn.run, double, max_concurrency=1)
    assert (await call(toolbox, "run", 0.1)).error == "timed out after 0.1 s"
    assert toolbox.running == 1
    waiting = asyncio.create_task(call(toolbox, "double", number=1))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    stubborn.let_go.set()
    assert (await waiting).success
    assert toolbox.running == 0


async def test_no_more_run_at_once_than_there_are_places() -> None:
    running, most = 0, 0

    async def counted() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1

    toolbox = box(counted, max_concurrency=3)
    results = await asyncio.gather(*(call(toolbox, "counted") for _ in range(20)))
    assert all(result.success for result in results)
    assert most == 3


async def test_waiting_for_a_place_is_not_the_tools_time_and_has_an_end() -> None:
    stubborn = Stubborn()
    tools = [ExternalTool(function.__name__, "", ANYTHING, function) for function in (stubborn.run, double)]
    patient, hurried = ExternalToolbox(tools, 1), ExternalToolbox(tools, 1, queue_timeout_s=0.1)
    taken = [asyncio.create_task(call(toolbox, "run")) for toolbox in (patient, hurried)]
    await until(lambda: patient.running == hurried.running == 1)
    with pytest.raises(ToolServerError, match="all places for external tools were taken"):
        await call(hurried, "double", number=4)
    waiting = asyncio.create_task(call(patient, "double", 1.0, number=4))
    await asyncio.sleep(1.5)
    stubborn.let_go.set()
    assert (await waiting).output == "8"
    await asyncio.gather(*taken)


async def test_a_call_that_is_given_up_gives_its_place_back() -> None:
    toolbox = box(slow, double, max_concurrency=1)
    given_up = asyncio.create_task(call(toolbox, "slow"))
    await asyncio.sleep(0.05)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert (await call(toolbox, "double", number=2)).output == "4"


async def test_long_output_is_cut() -> None:
    output = (await call(box(long), "long")).output
    assert output.startswith("x" * MAX_OUTPUT_CHARS)
    assert output.endswith("\n[... 5 characters dropped ...]")


def test_tools_that_cannot_work_are_refused_when_they_are_made() -> None:
    with pytest.raises(ConfigError, match="not a JSON schema"):
        ExternalTool("x", "", {"type": "thing"}, double)
    with pytest.raises(ConfigError, match="of type 'object'"):
        ExternalTool("x", "", {"type": "string"}, double)
    with pytest.raises(ConfigError, match="not async"):
        ExternalTool("x", "", ANYTHING, lambda: "x")  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="timeout"):
        ExternalTool("x", "", ANYTHING, double, timeout_s=0)
    with pytest.raises(ConfigError, match="two external tools 'double'"):
        box(double, double)


def test_arguments_are_checked_without_breaking() -> None:
    nested: Any = {
        "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
        "properties": {"x": {"$ref": "#/$defs/n"}},
    }
    deep: list[Any] = []
    for _ in range(800):
        deep = [deep]
    tool = ExternalTool("x", "", {"type": "object", **nested}, double)
    assert tool.find_problem({"x": [[]]}) is None
    assert tool.find_problem({"x": deep}) == "arguments of x: too deeply nested, or a number is too large"
    half = {"type": "object", "properties": {"x": {"type": "number", "multipleOf": 0.5}}}
    assert "too large" in (ExternalTool("y", "", half, double).find_problem({"x": 10**400}) or "")
    assert "required property" in (ExternalTool("y", "", half | {"required": ["x"]}, double).find_problem({}) or "")
