"""The loop: ask the policy, run what it calls, show it the results, until it calls nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from hermes_envs.errors import EngineRefusalError
from hermes_envs.policies.base import ContextFullError, Conversation, Message, Turn
from hermes_envs.rollouts.trajectory import End, Stopwatch, ToolCounts, Trajectory
from hermes_envs.tools.call import ToolCall
from hermes_envs.tools.executor import ToolExecutor
from hermes_envs.workspace import Workspace


class AgentOptions(BaseModel):
    """How long an agent may go on."""

    model_config = ConfigDict(extra="forbid")

    agent_max_steps: int = Field(50, ge=1, description="Most turns of the model in one trajectory.")
    agent_tool_delay_s: float = Field(0.0, ge=0, description="Pause before each tool call, for endpoints with rate limits.")


class Agent:
    """Runs one trajectory with a policy's conversation and the tools of a workspace."""

    def __init__(self, executor: ToolExecutor, options: AgentOptions) -> None:
        self._executor = executor
        self._options = options

    async def run(
        self, prompt: Sequence[Message], conversation: Conversation, workspace: Workspace, stopwatch: Stopwatch
    ) -> Trajectory:
        """Play until the model stops calling tools or something runs out.

        Raises:
            EngineError: the policy's engine failed, had no room for a first turn, or the record does not hold.
            SandboxError: the slot failed.
        """
        transcript: list[Message] = []
        new_messages = list(prompt)
        counts, steps = ToolCounts(), 0
        end: End = "max_steps"
        while steps < self._options.agent_max_steps:
            transcript.extend(new_messages)
            try:
                with stopwatch.measure("model"):
                    turn = await conversation.respond(new_messages)
            except ContextFullError as reason:
                if not steps:
                    # The policy has not done anything that it could be judged by.
                    raise EngineRefusalError(f"there is no room for a first turn: {reason}") from reason
                end = "context"
                break
            steps += 1
            transcript.append(turn.message)
            if not turn.tool_calls:
                end = _end_of(turn)
                break
            with stopwatch.measure("tools"):
                new_messages = [await self._observe(call, workspace, counts) for call in turn.tool_calls]
        else:
            transcript.extend(new_messages)
        conversation.record.check()
        return Trajectory(
            trajectory_id=conversation.record.trajectory_id,
            messages=transcript,
            record=conversation.record,
            end=end,
            steps=steps,
            tool_counts=counts,
            stopwatch=stopwatch,
        )

    async def _observe(self, call: ToolCall, workspace: Workspace, counts: ToolCounts) -> Message:
        if self._options.agent_tool_delay_s:
            await asyncio.sleep(self._options.agent_tool_delay_s)
        result = await self._executor.execute(workspace, call)
        counts.count(result)
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result.content}


def _end_of(turn: Turn) -> End:
    return "length" if turn.finish_reason == "length" else "stop"
