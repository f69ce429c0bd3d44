"""What a model may say in a turn: good calls and broken ones, in tokens that a tokenizer would choose and in others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from tests.engine.tokenizer import byte_tokens, token_ids
from tests.engine.turns import Turns


def says(tokenizer: PreTrainedTokenizerFast, text: str) -> Callable[[list[int]], list[int]]:
    """A model that always answers this."""
    return lambda prompt: tokenizer.encode(text, add_special_tokens=False)


class Speech:
    """Makes up turns, as token ids to be forced on the engine's model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self.kinds: list[str] = []
        self._end, self._end_of_text = token_ids(tokenizer, "<|im_end|>", "<|endoftext|>")

    def __call__(self, prompt: list[int]) -> list[int]:
        """Another kind of turn each time. A turn without an end is cut by the engine's limit or goes on at random."""
        makers = {
            "random": self._anything,
            "text": self._text,
            "several calls": self._calls,
            "reasoned call": self._reasoned_call,
            "call in single bytes": self._call_in_bytes,
            "words in single bytes": self._words_in_bytes,
            "broken UTF-8": self._broken_utf8,
            "malformed beside good": self._malformed,
            "unclosed call": self._unclosed_call,
            "truncated call": self._truncated_call,
            "truncated reasoning": self._truncated_reasoning,
            "unclosed reasoning": self._unclosed_reasoning,
            "stray end of reasoning": self._stray_tag,
            "another stop token": self._another_stop,
            "spelled stop token": self._spelled_stop,
            "nothing": self._nothing,
        }
        # Turns that call something are said more often, for a rollout goes on after them without a new question.
        kind = self._random.choices(list(makers), [4 if "call" in kind or "good" in kind else 1 for kind in makers])[0]
        self.kinds.append(kind)
        return makers[kind]()

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _bytes(self, text: str) -> list[int]:
        return byte_tokens(self._tokenizer, text.encode())

    def _call(self, name: str = "bash") -> str:
        command = self._random.choice(["ls -la", "grep -rn 'é' .", 'echo "a\\nb"', "true"])
        return "<tool_call>\n" + json.dumps({"name": name, "arguments": {"command": command}}) + "\n</tool_call>"

    def _anything(self) -> list[int]:
        return []

    def _text(self) -> list[int]:
        return [*self._ids("  I think that the tests pass \n\n"), self._end]

    def _calls(self) -> list[int]:
        calls = "\n".join(self._call() for _ in range(self._random.randint(1, 3)))
        return [*self._ids("I look at it.\n" + calls), self._end]

    def _reasoned_call(self) -> list[int]:
        return [*self._ids("<think>\nWhat is there?\n</think>\n\n" + self._call()), self._end]

    def _call_in_bytes(self) -> list[int]:
        opening, closing = token_ids(self._tokenizer, "<tool_call>", "</tool_call>")
        return [opening, *self._bytes('\n{"name": "bash", "arguments": {"command": "ls ä"}}\n'), closing, self._end]

    def _words_in_bytes(self) -> list[int]:
        return [*self._ids("The "), *self._bytes("function"), *self._ids(" returns"), *self._bytes(" another value"), self._end]

    def _broken_utf8(self) -> list[int]:
        return [*self._ids("found "), *byte_tokens(self._tokenizer, b"\xc3 \xff\xfe \xe2\x82"), self._end]

    def _malformed(self) -> list[int]:
        bad = self._random.choice(
            ['{"name": "bash", "arguments": {"command": ', '{"arguments": {}}', "ls -la", "[1]", '{"name": 5}']
        )
        return [*self._ids(f"{self._call()}\n<tool_call>\n{bad}\n</tool_call>\n{self._call('read_file')}"), self._end]

    def _unclosed_call(self) -> list[int]:
        return [*self._ids('<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}'), self._end]

    def _truncated_call(self) -> list[int]:
        return self._ids('<tool_call>\n{"name": "write_file", "arguments": {"content": "' + "value " * 200)

    def _truncated_reasoning(self) -> list[int]:
        return self._ids("<think>\n" + "hmm, " * 200)

    def _unclosed_reasoning(self) -> list[int]:
        return [*self._ids("<think>\nI do not know."), self._end]

    def _stray_tag(self) -> list[int]:
        return [*self._ids("so it is.\n</think>\n\n" + self._call()), self._end]

    def _another_stop(self) -> list[int]:
        return [*self._ids(self._call()), self._end_of_text]

    def _spelled_stop(self) -> list[int]:
        return [*self._bytes("a turn ends with <|im_end|>"), *self._ids(" as you know"), self._end]

    def _nothing(self) -> list[int]:
        return [self._end]


class FamilySpeech:
    """Makes up turns of any family, from those that its own renderer writes: whole, cut, garbled, or in single bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, turns: Turns, seed: int) -> None:
        self._tokenizer = tokenizer
        self._turns = turns
        self._random = random.Random(seed)
        self.kinds: list[str] = []

    def __call__(self, prompt: list[int]) -> list[int]:
        """Another kind of turn each time. A turn without an end is cut by the engine's limit or goes on at random."""
        makers: dict[str, Callable[[], list[int]]] = {
            "random": list,
            "text": lambda: self._ended("  I think that the tests pass \n\n"),
            "call": lambda: self._turns.call,
            "two calls": lambda: self._turns.calls,
            "reasoned call": lambda: self._turns.reasoned_call,
            "thoughtful call": lambda: [*self._ids("<think>\nWhat is there?\n</think>\n\n"), *self._turns.call],
            "reasoned text": lambda: self._turns.reasoned_text,
            "cut call": self._cut,
            "garbled call": self._garbled,
            "truncated call": lambda: self._turns.call[: len(self._turns.call) // 2] + self._ids("value " * 200),
            "words in single bytes": lambda: [
                *byte_tokens(self._tokenizer, "The function returns ä".encode()),
                self._turns.stop,
            ],
            "broken UTF-8": lambda: [*byte_tokens(self._tokenizer, b"\xc3 \xff\xfe \xe2\x82"), self._turns.stop],
            "spelled stop token": self._spelled_stop,
            "another stop token": lambda: [*self._ids("so it is."), self._random.choice(self._turns.stops)],
            "stray end of reasoning": lambda: self._ended("so it is.\n</think>\n\n"),
            "nothing": lambda: [self._turns.stop],
        }
        # Turns that call something are said more often, for a rollout goes on after them without a new question.
        kind = self._random.choices(list(makers), [4 if "call" in kind else 1 for kind in makers])[0]
        self.kinds.append(kind)
        return list(makers[kind]())

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _ended(self, text: str) -> list[int]:
        return [*self._ids(text), self._turns.stop]

    def _cut(self) -> list[int]:
        call = self._turns.call
        return [*call[: self._random.randint(1, len(call) - 1)], call[-1]]

    def _garbled(self) -> list[int]:
        calls = self._turns.calls
        place = self._random.randint(0, len(calls) - 2)
        return calls[:place] + calls[place + self._random.randint(1, 4) : -1] + calls[-1:]

    def _spelled_stop(self) -> list[int]:
        spelled = byte_tokens(self._tokenizer, f"a turn ends with {self._tokenizer.decode([self._turns.stop])}".encode())
        return [*spelled, *self._ids(" as you know"), self._turns.stop]
