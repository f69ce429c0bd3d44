"""What a model of a family says when it says it well: its turns as its own renderer writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.rendering.chat_renderer import UNSUITABLE, ChatRenderer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Use {name}; süß.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string", "description": "What to run."}},
                "required": ["command"],
            },
        },
    }
    for name in ("bash", "read_file")
]
QUESTION: dict[str, Any] = {"role": "user", "content": "What is in the repository?"}


def call(name: str, command: str, number: int = 0) -> dict[str, Any]:
    """A call in a message, with an id that every template takes."""
    return {
        "id": f"functions.{name}:{number}",
        "type": "function",
        "function": {"name": name, "arguments": {"command": command}},
    }


class Turns:
    """Turns as token ids, each with the stop token that ends it. A kind that the family cannot say is the next simpler one.

    `stop` ends a turn without calls, `stops` are all that may end one.
    """

    def __init__(self, renderer: ChatRenderer, tools: Sequence[dict[str, Any]]) -> None:
        self._renderer = renderer
        self._tools = tools
        self.stops = renderer.stop_token_ids
        text = self.of({"role": "assistant", "content": "It is done."})
        self.text = text
        self.stop = text[-1]
        self.reasoned_text = self.of({"role": "assistant", "content": "It is done.", "reasoning_content": "Is it?"}, text)
        if not tools:
            self.call = self.calls = self.reasoned_call = text
            return
        first, second = call("bash", "ls -la 'é'"), call("read_file", "a.py", 1)
        self.call = self.of({"role": "assistant", "content": "", "tool_calls": [first]})
        self.reasoned_call = self.of(
            {"role": "assistant", "content": "", "reasoning_content": "What is there?", "tool_calls": [first]}, self.call
        )
        self.calls = self.of({"role": "assistant", "content": "I look.", "tool_calls": [first, second]}, self.call)

    def of(self, message: dict[str, Any], otherwise: list[int] | None = None) -> list[int]:
        """One turn. `otherwise` where the family's template refuses the message."""
        results = [
            {"role": "tool", "tool_call_id": made["id"], "name": made["function"]["name"], "content": "a.py"}
            for made in message.get("tool_calls", ())
        ]
        try:
            prompt = self._renderer.prompt([QUESTION], self._tools)
            # What a model says is not asked for anywhere else: a whole conversation without a prompt for the next turn.
            whole = self._renderer._renderer.render_ids(
                [QUESTION, message], tools=list(self._tools) or None, add_generation_prompt=False
            )
            followed = self._renderer.prompt([QUESTION, message, *(results or [QUESTION])], self._tools)
        except (*UNSUITABLE, ConfigError, EngineError):
            if otherwise is None:
                raise
            return otherwise
        common = next((n for n, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
        said = whole[common:]
        rewritten = self._renderer.decode(prompt[common:])
        if "</think" in rewritten and otherwise is not None:
            # The prompt has closed the reasoning before it began.
            return otherwise
        if "<think" in rewritten and "</think" not in rewritten:
            # The prompt has opened reasoning that the template drops later, or closes at once.
            closed = self._renderer.decode(said).startswith("</think>")
            said = [*self._renderer.encode("Hm." if closed else "Hm.\n</think>\n\n"), *said]
        end = next((n for n, token in enumerate(said) if token in self.stops), None)
        if end is not None:
            return said[: end + 1]
        # The token of the next role ends the turn.
        return [*said, next(token for token in followed[common:] if token in self.stops)]
