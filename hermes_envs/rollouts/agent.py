"""The loop: ask the policy, run what it calls, show it the results, until it calls nothing more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from hermes_envs.errors import EngineError, EngineRefusalError
from hermes_envs.policies.base import ContextFullError, Conversation, Message, Turn
from hermes_envs.rollouts.trajectory import End, Episode, Stopwatch, ToolCounts
from hermes_envs.tools.call import ToolCall
from hermes_envs.tools.executor import ToolExecutor
from hermes_envs.workspace import Workspace

_LEAST_TOOL_S = 0.1


class AgentOptions(BaseModel):
    """How long an agent may go on."""

    model_config = ConfigDict(extra="forbid")

    agent_max_steps: int = Field(50, ge=1, description="Most turns of the model in one trajectory.")
    agent_tool_delay_s: float = Field(0.0, ge=0, description="Pause before each tool call, for endpoints with rate limits.")


@dataclass
class _Progress:
    """What an agent has done so far."""

    messages: list[Message]
    counts: ToolCounts = field(default_factory=ToolCounts)
    steps: int = 0


class Agent:
    """Runs one trajectory with a policy's conversation and the tools of a workspace."""

    def __init__(self, executor: ToolExecutor, options: AgentOptions) -> None:
        self._executor = executor
        self._options = options

    async def run(
        self,
        prompt: Sequence[Message],
        conversation: Conversation,
        workspace: Workspace,
        stopwatch: Stopwatch,
        *,
        deadline: float = math.inf,
    ) -> Episode:
        """Play until the model stops calling tools or something runs out.

        `deadline` is a time of the event loop. An answer that is not there by then is given up, and a tool ends as it does when
        its own time is over.

        Raises:
            EngineError: the policy's engine failed, had neither room nor time for a first turn, or the record does not hold.
            SandboxError: the slot failed.
        """
        progress = _Progress(list(prompt))
        end = await self._play(conversation, workspace, stopwatch, progress, deadline)
        conversation.record.check()
        return Episode(
            trajectory_id=conversation.record.trajectory_id,
            messages=progress.messages,
            record=conversation.record,
            end=end,
            steps=progress.steps,
            tool_counts=progress.counts,
            stopwatch=stopwatch,
        )

    async def _play(
        self, conversation: Conversation, workspace: Workspace, stopwatch: Stopwatch, progress: _Progress, deadline: float
    ) -> End:
        new_messages = list(progress.messages)
        while progress.steps < self._options.agent_max_steps:
            try:
                with stopwatch.measure("model"):
                    turn = await _respond(conversation, new_messages, deadline)
            # Without a first turn the policy has not done anything that it could be judged by.
            except ContextFullError as reason:
                if not progress.steps:
                    raise EngineRefusalError(f"there is no room for a first turn: {reason}") from reason
                return "context"
            except _TimeOverError as reason:
                if not progress.steps:
                    raise EngineError(f"there is no time for a first turn: {reason}") from reason
                return "timeout"
            progress.steps += 1
            progress.messages.append(turn.message)
            if not turn.tool_calls:
                return _end_of(turn)
            new_messages = []
            with stopwatch.measure("tools"):
                for call in turn.tool_calls:
                    new_messages.append(await self._observe(call, workspace, progress.counts, deadline))
                    progress.messages.append(new_messages[-1])
                    if _remaining(deadline) <= 0:
                        return "timeout"
        return "max_steps"

    async def _observe(self, call: ToolCall, workspace: Workspace, counts: ToolCounts, deadline: float) -> Message:
        if self._options.agent_tool_delay_s:
            await asyncio.sleep(min(self._options.agent_tool_delay_s, max(_remaining(deadline), 0.0)))
        result = await self._executor.execute(workspace, call, timeout_s=max(_remaining(deadline), _LEAST_TOOL_S))
        counts.count(result)
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result.content}


class _TimeOverError(Exception):
    """The deadline has passed."""


async def _respond(conversation: Conversation, new_messages: Sequence[Message], deadline: float) -> Turn:
    try:
        async with asyncio.timeout_at(None if deadline == math.inf else deadline) as limit:
            return await conversation.respond(new_messages)
    except TimeoutError:
        if not limit.expired():
            raise
        raise _TimeOverError("the time of the rollout is over") from None


def _remaining(deadline: float) -> float:
    return deadline - asyncio.get_running_loop().time()


def _end_of(turn: Turn) -> End:
    return "length" if turn.finish_reason == "length" else "stop"
