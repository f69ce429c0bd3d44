"""What a trainer gets of a group: items in which each trajectory counts once, whatever became of its history."""

from __future__ import annotations

import copy
import json
from itertools import count

import pytest

from hermes_envs.policies.base import assistant_message
from hermes_envs.policies.token_record import UNTRAINED_LOGPROB, UNTRAINED_MASK, Segment, TokenRecord
from hermes_envs.rollouts.group import FILLER_TOKENS, Group
from hermes_envs.rollouts.trajectory import Score, Stopwatch, ToolCounts, Trajectory
from hermes_envs.tools.call import ToolCall

_TOKENS = count(1000)


def segment() -> Segment:
    made = Segment()
    made.append_turn([next(_TOKENS) for _ in range(4)], [next(_TOKENS) for _ in range(3)], [-0.5, -1.0, -0.25])
    return made


def trajectory(name: str, score: float, segments: int) -> Trajectory:
    rollout = TokenRecord(name, [segment() for _ in range(segments)], engine_calls=segments)
    messages = [{"role": "user", "content": name}, {"role": "assistant", "content": None}]
    return Trajectory(name, messages, rollout, "stop", 1, ToolCounts(), Stopwatch(), Score(score, "it is"))


def group(*segments: int) -> Group:
    made = [trajectory(f"t{number}", number / 10, amount) for number, amount in enumerate(segments)]
    return Group("task", tuple(made), ())


def test_every_item_has_one_sequence_for_each_trajectory_with_its_score() -> None:
    items = group(1, 3, 2).items()
    assert len(items) == 3
    for number, item in enumerate(items):
        assert [len(item[key]) for key in ("tokens", "masks", "inference_logprobs", "messages", "overrides")] == [3] * 5
        assert item["scores"] == [0.0, 0.1, 0.2]
        assert item["group_overrides"] == {"group_size": 3, "segment": number}
        assert [one["trajectory_id"] for one in item["overrides"]] == ["t0", "t1", "t2"]
        assert [(one["segment"], one["segments"]) for one in item["overrides"]] == [(number, 1), (number, 3), (number, 2)]


def test_each_sampled_token_is_trained_once_and_with_the_same_advantage() -> None:
    made = group(1, 3, 2)
    trained: dict[int, float] = {}
    for item in made.items():
        mean = sum(item["scores"]) / len(item["scores"])
        for tokens, masks, logprobs, score in zip(
            *(item[key] for key in ("tokens", "masks", "inference_logprobs", "scores")), strict=True
        ):
            assert len(tokens) == len(masks) == len(logprobs) >= FILLER_TOKENS
            for token, mask, logprob in zip(tokens, masks, logprobs, strict=True):
                assert (mask == UNTRAINED_MASK) == (logprob == UNTRAINED_LOGPROB)
                if mask != UNTRAINED_MASK:
                    assert token not in trained
                    trained[token] = score - mean
    for one in made.trajectories:
        assert one.score is not None
        sampled = [token for part in one.record.segments for token in part.masks if token != UNTRAINED_MASK]
        assert [trained.pop(token) for token in sampled] == pytest.approx([one.score.value - 0.1] * len(sampled))
    assert not trained


def test_who_has_no_segment_left_is_named_and_not_trained() -> None:
    first, second = group(1, 2).items()
    assert ["set_advantage_to_zero" in one for one in first["overrides"]] == [False, False]
    assert [one.get("set_advantage_to_zero", False) for one in second["overrides"]] == [True, False]
    assert second["tokens"][0] == first["tokens"][0][:FILLER_TOKENS]
    assert set(second["masks"][0]) == {UNTRAINED_MASK}


def test_policies_without_tokens_give_one_item_and_nobody_gives_none() -> None:
    [item] = group(0, 0).items()
    assert item["tokens"] == item["masks"] == item["inference_logprobs"] == [[], []]
    assert item["messages"][0] == [{"role": "user", "content": "t0"}, {"role": "assistant", "content": ""}]
    assert Group("task", (), ()).items() == []


def test_a_record_has_the_arguments_of_calls_as_text_and_of_malformed_ones_as_they_were_written() -> None:
    good = ToolCall.parse("c0", "bash", {"command": "ls 'é'", "n": [1, {"a": None, "b": 1.0}]}, "as it was written")
    bad = ToolCall.parse("c1", "bash", '{"command": ')
    result = {"role": "tool", "tool_call_id": "c0", "name": "bash", "content": "a.py"}
    messages = [{"role": "user", "content": "x"}, assistant_message("I look.", [good, bad], "Files?"), result]
    before = copy.deepcopy(messages)
    made = Trajectory("t", messages, TokenRecord("t"), "stop", 1, ToolCounts(), Stopwatch(), Score(1.0, "it is"))

    [item] = Group("task", (made,), ()).items()

    [written] = item["messages"]
    assert json.dumps(written[1], ensure_ascii=False) == (
        '{"role": "assistant", "content": "I look.", "reasoning_content": "Files?", "tool_calls": ['
        '{"id": "c0", "type": "function", "function": {"name": "bash", '
        '"arguments": "{\\"command\\": \\"ls \'é\'\\", \\"n\\": [1, {\\"a\\": null, \\"b\\": 1.0}]}"}}, '
        '{"id": "c1", "type": "function", "function": {"name": "bash", "arguments": "{\\"command\\": "}}]}'
    )
    assert (written[0], written[2]) == (messages[0], messages[2])
    assert messages == before, "the transcript keeps the objects"
