"""Any OpenAI-compatible chat endpoint: for data generation and evaluation. There is no token data, and none is invented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.policies.base import (
    Conversation,
    FinishReason,
    Message,
    Policy,
    Reference,
    SamplingOptions,
    Turn,
    assistant_message,
    with_text_arguments,
)
from hermes_envs.policies.chat_endpoint import ChatEndpoint
from hermes_envs.policies.endpoints import Endpoints
from hermes_envs.policies.token_record import TokenRecord
from hermes_envs.tools.call import ToolCall

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig

# A call that was cut off has no end tag.
_WRITTEN_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_WRITTEN_REASONING = re.compile(r"\A\s*<think>(.*?)</think>", re.DOTALL)


class MessagesPolicy(Policy):
    """Asks chat endpoints for whole messages."""

    endpoints: Endpoints[ChatEndpoint]

    def __init__(self, servers: Sequence[APIServerConfig], options: SamplingOptions) -> None:
        """Raises: ConfigError: no endpoint, or one without an address."""
        if not servers:
            raise ConfigError("openai.base_url: policy messages needs the address of a chat endpoint")
        super().__init__(Endpoints([ChatEndpoint(config) for config in servers]))
        self._options = options

    def start(
        self, trajectory_id: str, *, tools: Sequence[dict[str, Any]], reference: Reference | None = None
    ) -> MessagesConversation:
        return MessagesConversation(trajectory_id, tools, self)

    async def complete(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Ask for one completion; returns the endpoint's reply. Raises as `Endpoints.ask` and `ChatEndpoint.complete`."""
        request: dict[str, Any] = {"messages": list(messages), "temperature": self._options.agent_temperature}
        if self._options.agent_max_tokens is not None:
            request["max_tokens"] = self._options.agent_max_tokens
        if tools:
            request["tools"] = list(tools)
        return await self.endpoints.ask(lambda endpoint: endpoint.complete(request))


class MessagesConversation(Conversation):
    """One trajectory's messages. A failed `respond` leaves it as it was, so that the same messages may be tried again."""

    def __init__(self, trajectory_id: str, tools: Sequence[dict[str, Any]], policy: MessagesPolicy) -> None:
        self.record = TokenRecord(trajectory_id)
        self._tools = list(tools)
        self._policy = policy
        self._history: list[Message] = []
        self._call_ids: set[str] = set()
        self._written_ids: set[str] = set()

    async def respond(self, new_messages: Sequence[Message]) -> Turn:
        """As `Conversation.respond`."""
        history = [*self._history, *map(self._as_sent, new_messages)]
        reply = await self._policy.complete(history, self._tools)
        message, finish_reason = _message(reply)
        self.record.engine_calls += 1
        content, reasoning = _text(message.get("content")), message.get("reasoning_content") or message.get("reasoning")
        calls = [self._native_call(call) for call in _native_calls(message)]
        if calls:
            self._history = [*history, with_text_arguments(assistant_message(content, [_well_formed(call) for call in calls]))]
        else:
            # Sent back as it was written: the endpoint may not support native calls.
            self._history = [*history, {"role": "assistant", "content": content}]
            written = _WRITTEN_REASONING.match(content)
            if written:
                reasoning, content = reasoning or written[1].strip(), content[written.end() :].lstrip()
            calls = [self._written_call(text, closed) for text, closed in _written_calls(content)]
            self._written_ids.update(call.id for call in calls)
            content = _WRITTEN_CALL.sub("", content).strip() if calls else content
        return Turn(
            assistant_message(content, calls, reasoning if isinstance(reasoning, str) else None),
            tuple(calls),
            _finish_reason(finish_reason, calls),
        )

    def _as_sent(self, message: Message) -> Message:
        """As the endpoint gets it. The result of a call that was written as text is sent as text: it has no native call."""
        if message["role"] != "tool" or message.get("tool_call_id") not in self._written_ids:
            return with_text_arguments(message)
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}

    def _new_id(self, wanted: object = None) -> str:
        """An id that no call of this trajectory has yet: `wanted` if it is one."""
        id = wanted if isinstance(wanted, str) and wanted else f"call_{len(self._call_ids)}"
        if id in self._call_ids:
            id = f"{id}_{len(self._call_ids)}"
        self._call_ids.add(id)
        return id

    def _native_call(self, call: object) -> ToolCall:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict):
            return ToolCall(self._new_id(), "", None, str(call), "the tool call has no function")
        return self._call(self._new_id(call.get("id")), function, str(function.get("arguments")))

    def _written_call(self, text: str, closed: bool) -> ToolCall:
        id = self._new_id()
        try:
            function = json.loads(text)
        except (ValueError, RecursionError) as reason:
            fault = f"is not valid JSON: {reason}" if closed else "was not closed before the answer ended"
            return ToolCall(id, "", None, text, f"the tool call {fault}")
        if not isinstance(function, dict):
            return ToolCall(id, "", None, text, "the tool call is not a JSON object")
        return self._call(id, function, text)

    def _call(self, id: str, function: dict[str, Any], raw: str) -> ToolCall:
        name = function.get("name")
        if not isinstance(name, str) or not name:
            return ToolCall(id, "", None, raw, "the tool call does not name a tool")
        return ToolCall.parse(id, name, function.get("arguments"), raw)


def _message(reply: dict[str, Any]) -> tuple[dict[str, Any], object]:
    """The first choice's message and finish reason.

    Raises:
        EngineError: the reply has none. An empty message is an answer.
    """
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        what = reply.get("error") or f"it has {', '.join(map(repr, reply)) or 'nothing'}"
        raise EngineError(f"the endpoint's reply has no message: {str(what)[:300]}")
    return message, choice.get("finish_reason")


def _text(content: object) -> str:
    """The text of content that is text, a list of parts, or null."""
    if isinstance(content, list):
        return "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in content)
    return "" if content is None else str(content)


def _native_calls(message: dict[str, Any]) -> list[object]:
    calls = message.get("tool_calls") or []
    return calls if isinstance(calls, list) else [calls]


def _written_calls(content: str) -> Iterator[tuple[str, bool]]:
    """Calls in Hermes' form, `<tool_call>{json}</tool_call>`, from endpoints that do not parse them; and if they are closed."""
    for match in _WRITTEN_CALL.finditer(content):
        yield match[1].strip(), bool(match[2])


def _well_formed(call: ToolCall) -> ToolCall:
    """The call as it is sent back: servers refuse a history in which a call's arguments are no JSON object."""
    return call if call.arguments is not None else ToolCall(call.id, call.name or "malformed", {"malformed": call.raw})


def _finish_reason(reason: object, calls: Sequence[ToolCall]) -> FinishReason:
    if reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"
