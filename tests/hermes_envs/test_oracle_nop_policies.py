from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hermes_envs.errors import ConfigError
from hermes_envs.policies import PolicyOptions, create_policy
from hermes_envs.policies.base import Policy
from hermes_envs.policies.nop import NopPolicy
from hermes_envs.policies.oracle import OraclePolicy
from hermes_envs.tools.call import ToolCall


def policy_named(name: str) -> Policy:
    policy = create_policy(PolicyOptions.model_validate({"policy": name}))
    assert policy.endpoints.models == []
    return policy


async def test_oracle_makes_one_call_a_turn_and_then_says_that_it_is_done() -> None:
    reference = [ToolCall("a", "bash", {"command": "git apply fix.patch"}), ToolCall("b", "write_file", {"path": "ä"})]
    conversation = policy_named("oracle").start("t", tools=[], reference=reference)

    turns = [await conversation.respond([{"role": "user", "content": "Repair it."}])]
    while turns[-1].tool_calls:
        [call] = turns[-1].tool_calls
        turns.append(await conversation.respond([{"role": "tool", "tool_call_id": call.id, "content": "failed"}]))

    assert [turn.tool_calls for turn in turns] == [(reference[0],), (reference[1],), ()]
    assert [turn.finish_reason for turn in turns] == ["tool_calls", "tool_calls", "stop"]
    [sent] = turns[1].message["tool_calls"]
    assert (sent["id"], sent["type"], sent["function"]["name"]) == ("b", "function", "write_file")
    assert sent["function"]["arguments"] == {"path": "ä"}
    assert turns[2].message["content"]
    assert "tool_calls" not in turns[2].message
    assert (conversation.record.trajectory_id, conversation.record.segments) == ("t", [])


async def test_a_text_of_the_reference_is_the_final_response() -> None:
    conversation = policy_named("oracle").start("t", tools=[], reference=[ToolCall("a", "bash", {}), "forty-two"])
    assert (await conversation.respond([{"role": "user", "content": ""}])).tool_calls
    last = await conversation.respond([{"role": "tool", "tool_call_id": "a", "content": ""}])
    assert (last.message["content"], last.tool_calls, last.finish_reason) == ("forty-two", (), "stop")


async def test_an_empty_reference_is_a_solution_too() -> None:
    turn = await policy_named("oracle").start("t", tools=[], reference=[]).respond([{"role": "user", "content": ""}])

    assert (turn.tool_calls, turn.finish_reason) == ((), "stop")


def test_oracle_names_the_task_without_a_reference() -> None:
    with pytest.raises(ConfigError, match=r"policy: oracle .* 'task-7'"):
        OraclePolicy().start("task-7", tools=[])


async def test_nop_says_one_thing_and_calls_nothing() -> None:
    conversation = policy_named("nop").start("t", tools=[], reference=[ToolCall("a", "bash", {})])

    turn = await conversation.respond([{"role": "user", "content": "Repair it."}])

    assert (turn.tool_calls, turn.finish_reason) == ((), "stop")
    assert turn.message["content"]
    assert not conversation.record.segments


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match=r"policy\n  Input should be 'tokens', 'messages', 'oracle' or 'nop'"):
        policy_named("orakle")


def test_policies_without_tokens_are_not_exact() -> None:
    policies: list[Any] = [OraclePolicy(), NopPolicy()]

    assert not any(policy.exact for policy in policies)
