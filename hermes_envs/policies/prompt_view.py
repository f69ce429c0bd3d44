"""Shortened views of a conversation that no longer fits into the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hermes_envs.policies.base import Message

KEPT_TURNS = 2
"""How many of the last turns are shown whole as long as that is possible."""

SHORT_OUTPUT_CHARS = 200
"""The length that an old tool output is shortened to, half from its beginning and half from its end."""


class PromptView:
    """Views of a conversation, each shorter than the one before it.

    A turn is an assistant message with the messages that follow it. All views begin with the messages before the first turn,
    which are the task, and end with the last turn. First the tool outputs of old turns are shortened, then old turns are left
    out, oldest first, and at last the outputs of the last turns are shortened.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        begun = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        self._head = list(messages[:begun])
        self._turns: list[list[Message]] = []
        for message in messages[begun:]:
            if message["role"] == "assistant":
                self._turns.append([])
            self._turns[-1].append(message)

    def shortened(self, fits: Callable[[Sequence[Message]], bool]) -> list[Message] | None:
        """The longest view that fits; None if none does."""
        views = self._views()
        # Trying a view costs a rendering: binary search.
        longest, beyond = 0, len(views)
        while longest < beyond:
            middle = (longest + beyond) // 2
            if fits(self._with(views[middle])):
                beyond = middle
            else:
                longest = middle + 1
        return self._with(views[longest]) if longest < len(views) else None

    def _views(self) -> list[list[list[Message]]]:
        old, last = [_short(turn) for turn in self._turns[:-KEPT_TURNS]], self._turns[-KEPT_TURNS:]
        views = [[*old[dropped:], *last] for dropped in range(len(old) + 1)]
        for place, turn in enumerate(last):
            later = last[place + 1 :]
            views.append([_short(turn), *later])
            if later:
                views.append(later)
        return views

    def _with(self, turns: Sequence[Sequence[Message]]) -> list[Message]:
        return [*self._head, *(message for turn in turns for message in turn)]


def _short(turn: Sequence[Message]) -> list[Message]:
    return [_short_output(message) if message["role"] == "tool" else message for message in turn]


def _short_output(message: Message) -> Message:
    content = str(message["content"])
    if len(content) <= 2 * SHORT_OUTPUT_CHARS:
        return message
    left_out, half = len(content) - SHORT_OUTPUT_CHARS, SHORT_OUTPUT_CHARS // 2
    return {**message, "content": f"{content[:half]}\n[{left_out} characters are no longer shown]\n{content[-half:]}"}
