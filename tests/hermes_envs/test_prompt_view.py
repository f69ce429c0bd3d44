from __future__ import annotations

from collections.abc import Sequence

from hermes_envs.policies.base import Message
from hermes_envs.policies.prompt_view import SHORT_OUTPUT_CHARS, PromptView

HEAD: list[Message] = [{"role": "system", "content": "You are careful."}, {"role": "user", "content": "Repair it."}]
LONG = "".join(f"line {number}\n" for number in range(200))


def turn(number: int, output: str = LONG) -> list[Message]:
    call = {"id": f"call_{number}", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    return [
        {"role": "assistant", "content": f"step {number}", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call_{number}", "name": "bash", "content": output},
    ]


def conversation(turns: int) -> list[Message]:
    return [*HEAD, *(message for number in range(turns) for message in turn(number))]


def size(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def steps(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def shortened(messages: Sequence[Message], limit: int) -> list[Message]:
    view = PromptView(messages).shortened(lambda shown: size(shown) <= limit)
    assert view is not None
    assert size(view) <= limit
    return view


def test_old_outputs_are_shortened_before_a_turn_is_left_out() -> None:
    messages = conversation(6)
    view = shortened(messages, size(messages) - 1)

    assert steps(view) == [f"step {number}" for number in range(6)]
    assert view[-4:] == messages[-4:]
    for message in view[3:-4:2]:
        content = message["content"]
        assert content.startswith(LONG[: SHORT_OUTPUT_CHARS // 2])
        assert content.endswith(LONG[-SHORT_OUTPUT_CHARS // 2 :])
        assert f"[{len(LONG) - SHORT_OUTPUT_CHARS} characters are no longer shown]" in content


def test_the_oldest_turns_go_first_and_no_more_than_needed() -> None:
    messages = conversation(8)
    mild = shortened(messages, size(messages) // 2)
    limits = [size(mild) - 1]
    for left in range(7, 2, -1):
        view = shortened(messages, limits[-1])
        assert view[:2] == HEAD
        assert steps(view) == [f"step {number}" for number in range(8 - left, 8)]
        assert view[-4:] == messages[-4:], "the last turns are whole"
        limits.append(size(view) - 1)


def test_the_last_turns_are_shortened_at_the_end() -> None:
    messages = conversation(3)
    sizes = []
    limit = size([*HEAD, *turn(1), *turn(2)])
    views = []
    while (view := PromptView(messages).shortened(lambda shown, most=limit: size(shown) <= most)) is not None:
        views.append([(message["content"] == LONG) for message in view if message["role"] == "tool"])
        sizes.append(size(view))
        limit = size(view) - 1
    assert views == [[True, True], [False, True], [True], [False]]
    assert sizes == sorted(sizes, reverse=True)


def test_what_cannot_be_shortened_is_none() -> None:
    assert PromptView(HEAD).shortened(lambda shown: False) is None
    assert PromptView(HEAD).shortened(lambda shown: shown == HEAD) == HEAD
    short = [*HEAD, *turn(0, "short"), *turn(1, "short")]
    assert PromptView(short).shortened(lambda shown: size(shown) < size([*HEAD, *turn(1, "short")])) is None


def test_all_messages_before_the_first_answer_stay() -> None:
    head: list[Message] = [*HEAD, {"role": "user", "content": "Begin with the tests."}]
    messages = [*head, *(message for number in range(6) for message in turn(number))]
    assert shortened(messages, size([*head, *turn(4), *turn(5)])) == [*head, *turn(4), *turn(5)]


def test_a_later_question_goes_with_the_turn_that_it_follows() -> None:
    """A later question belongs to the turn that it follows: no assistant message may stand first without it."""
    asked: list[Message] = [*HEAD, {"role": "assistant", "content": "done"}, {"role": "user", "content": "And now?"}, *turn(1)]
    view = shortened([*asked, *turn(2)], size([*HEAD, *turn(1), *turn(2)]))
    assert view == [*HEAD, *turn(1), *turn(2)]
