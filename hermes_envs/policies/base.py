"""The interface of policies: a conversation per trajectory, answered turn by turn."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hermes_envs.policies.endpoints import Endpoints
from hermes_envs.policies.token_record import TokenRecord
from hermes_envs.tools.call import ToolCall

Message = dict[str, Any]
"""A chat message in OpenAI's form: `role`, `content`; for some `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.

A call's `arguments` are an object, or the text that the model wrote where the call is malformed. `with_text_arguments` makes
the form that OpenAI's has.
"""

Reference = Sequence[ToolCall | str]
"""A task's solution: calls to be made and, for a task whose final response is scored, the text to end with."""

FinishReason = Literal["stop", "tool_calls", "length"]


class SamplingOptions(BaseModel):
    """How policies that ask a model sample."""

    model_config = ConfigDict(extra="forbid")

    agent_temperature: float = Field(default=0.7, ge=0, description="Sampling temperature of the agent's turns.")
    agent_max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens in one turn; none: as many as there is room for."
    )


class TokensOptions(SamplingOptions):
    """How rollouts with exact tokens are rendered and how long they may get."""

    max_context_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of prompt and answer together; none: agent_max_tokens limits each turn."
    )
    renderer: str = Field(
        default="auto", description="The model family's renderer, e.g. qwen3; auto: by the tokenizer's name or chat template."
    )


def assistant_message(content: str, tool_calls: Sequence[ToolCall] = (), reasoning: str | None = None) -> Message:
    """An assistant message. A malformed call shows what the model wrote as its arguments."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.raw if call.arguments is None else call.arguments},
            }
            for call in tool_calls
        ]
    return message


def with_text_arguments(message: Message) -> Message:
    """The message as records and OpenAI-compatible endpoints have it: the arguments of its calls are JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": dict(call["function"])} for call in message["tool_calls"]]
    for function in (call["function"] for call in calls):
        if isinstance(function.get("arguments"), dict):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**message, "tool_calls": calls}


@dataclass(frozen=True)
class Turn:
    """One answer of the policy: the assistant message for the transcript, and its calls, malformed ones included."""

    message: Message
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason


class Conversation(ABC):
    """One trajectory's exchange with a policy. `record` holds the exact tokens if the policy has any."""

    record: TokenRecord

    @abstractmethod
    async def respond(self, new_messages: Sequence[Message]) -> Turn:
        """Answer the whole prompt at first, later the messages that are new since the last turn.

        Raises:
            EngineError: the engine failed or its answer cannot be used; the trajectory is an infrastructure error.
            ContextFullError: the next prompt leaves no room for an answer; the trajectory ends here and is scored.
        """


class Policy(ABC):
    """Makes conversations; shared by all trajectories of a run."""

    exact: bool = False
    """Whether its rollouts carry exact tokens that a trainer may use."""
    validates: bool = False
    """Whether it is there to find tasks that reward whoever does nothing."""

    def __init__(self, endpoints: Endpoints[Any] | None = None) -> None:
        self.endpoints = Endpoints[Any]() if endpoints is None else endpoints
        """Where it asks a model; empty if it asks none."""

    @abstractmethod
    def start(
        self,
        trajectory_id: str,
        *,
        tools: Sequence[dict[str, Any]],
        reference: Reference | None = None,
    ) -> Conversation:
        """Begin a trajectory. `tools` are OpenAI function schemas; `reference` is the task's solution."""

    def limit_sequences(self, most_tokens: int) -> None:  # noqa: B027 - for policies with tokens only
        """Record no sequence with more tokens than a trainer takes."""

    async def aclose(self) -> None:
        """Close the connections to the endpoints."""
        await self.endpoints.aclose()


class ContextFullError(Exception):
    """The context has no room for another turn: an ordinary end of a trajectory."""
