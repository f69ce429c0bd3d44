"""Token in, token out: rollouts that are exact training data.

The state of a conversation is its token list. What the engine returned is appended unchanged, and the next turn's prompt is
that list followed by the new messages' tokens; nothing that was sampled is ever tokenised again. docs/architecture.md "Exact
tokens" says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hermes_envs.errors import ConfigError
from hermes_envs.policies.base import (
    Conversation,
    FinishReason,
    Message,
    Policy,
    Reference,
    TokensOptions,
    Turn,
    assistant_message,
)
from hermes_envs.policies.endpoints import Endpoints
from hermes_envs.policies.prompt_view import PromptView
from hermes_envs.policies.token_endpoint import TokenEndpoint
from hermes_envs.policies.token_engine import Sample, TokenEngine
from hermes_envs.policies.token_limits import TokenLimits
from hermes_envs.policies.token_record import Segment, TokenRecord
from hermes_envs.rendering.chat_renderer import ChatRenderer, ParsedAnswer
from hermes_envs.rendering.choice import create_chat_renderer

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig


class TokensPolicy(Policy):
    """Asks engines by token ids (SGLang, vLLM, the Tinker trainer)."""

    exact = True

    def __init__(
        self, servers: Sequence[APIServerConfig], tokenizer: Any, options: TokensOptions, engine_patience_s: float = 300.0
    ) -> None:
        """`engine_patience_s`: how long a request waits while the health checks of all servers fail.

        Raises:
            ConfigError: a server returns no token ids, no renderer suits the tokenizer, or nothing limits a turn.
        """
        super().__init__(Endpoints([TokenEndpoint(config) for config in servers], engine_patience_s))
        if options.agent_max_tokens is None and options.max_context_tokens is None:
            # Left to themselves engines cut a turn at 16 (vLLM), 128 (SGLang) or 256 (Tinker trainer) tokens.
            raise ConfigError("agent_max_tokens: policy tokens needs this or max_context_tokens to know how long a turn may be")
        self.renderer = create_chat_renderer(tokenizer, options.renderer)
        self._engine = TokenEngine(self.endpoints, self.renderer, options.agent_temperature)
        self._limits = TokenLimits(options.agent_max_tokens, options.max_context_tokens)

    def limit_sequences(self, most_tokens: int) -> None:
        """As `Policy.limit_sequences`: a lower limit than `max_context_tokens` takes its place in new conversations."""
        context = min(most_tokens, self._limits.context or most_tokens)
        self._limits = TokenLimits(self._limits.turn, context)

    def start(
        self, trajectory_id: str, *, tools: Sequence[dict[str, Any]], reference: Reference | None = None
    ) -> TokensConversation:
        return TokensConversation(trajectory_id, tools, self._engine, self.renderer, self._limits)


class TokensConversation(Conversation):
    """One trajectory's tokens. A failed `respond` leaves it as it was, so that the same messages may be tried again."""

    def __init__(
        self,
        trajectory_id: str,
        tools: Sequence[dict[str, Any]],
        engine: TokenEngine,
        renderer: ChatRenderer,
        limits: TokenLimits,
    ) -> None:
        self.record = TokenRecord(trajectory_id)
        self._tools = list(tools)
        self._engine = engine
        self._renderer = renderer
        self._limits = limits
        self._messages: list[Message] = []
        self._answer_tokens = 0
        """How many of the last segment's tokens, at its end, are the last answer."""

    async def respond(self, new_messages: Sequence[Message]) -> Turn:
        """As `Conversation.respond`; a prompt that rewrites history opens a new segment of the record.

        Raises:
            ValueError: there is no new message.
        """
        if not new_messages:
            raise ValueError("a turn needs at least one new message")
        messages, prompt, segment = self._prompt(new_messages)
        sample = await self._engine.sample(prompt, self._limits.room(len(prompt)))
        segment.append_turn(prompt[len(segment.tokens) :], sample.token_ids, sample.logprobs)
        if not self.record.segments or segment is not self.record.segments[-1]:
            self.record.segments.append(segment)
        self.record.engine_calls += 1
        self._answer_tokens = len(sample.token_ids)
        answer = self._renderer.parse(sample.token_ids, prompt, self._tools, f"call_{self.record.engine_calls}")
        message = assistant_message(answer.content, answer.tool_calls, answer.reasoning)
        self._messages = [*messages, self._for_rendering(message, answer, sample)]
        return Turn(message, answer.tool_calls, _finish_reason(answer, sample))

    def _prompt(self, new_messages: Sequence[Message]) -> tuple[list[Message], list[int], Segment]:
        """What the next prompt shows, its tokens, and the segment that it extends: the last, or a new one."""
        messages = [*self._messages, *new_messages]
        prompt, segment = self._whole_prompt(messages, new_messages)
        if len(prompt) > self._limits.prompt:
            shorter = self._shortened(messages)
            if shorter is not None:
                return shorter, self._renderer.prompt(shorter, self._tools), Segment()
        return messages, prompt, segment

    def _whole_prompt(self, messages: Sequence[Message], new_messages: Sequence[Message]) -> tuple[list[int], Segment]:
        if self.record.segments:
            segment = self.record.segments[-1]
            prompt, answer = segment.tokens[: -self._answer_tokens], segment.tokens[-self._answer_tokens :]
            extended = self._renderer.next_prompt(prompt, answer, new_messages, self._tools)
            if extended is not None:
                return extended, segment
        return self._renderer.prompt(messages, self._tools), Segment()

    def _shortened(self, messages: Sequence[Message]) -> list[Message] | None:
        """A view of the messages that leaves room for several turns, or at least for one."""
        for limit in self._limits.shortened_prompt, self._limits.prompt:
            view = PromptView(messages).shortened(lambda shown, limit=limit: self._tokens(shown) <= limit)  # type: ignore[misc]
            if view is not None:
                return view
        return None

    def _tokens(self, messages: Sequence[Message]) -> int:
        return len(self._renderer.prompt(messages, self._tools))

    def _for_rendering(self, message: Message, answer: ParsedAnswer, sample: Sample) -> Message:
        """The turn as a later segment's prompt shows it: a malformed call cannot be rendered as a call, only as its text."""
        if all(call.error is None for call in answer.tool_calls):
            return message
        closed = sample.token_ids[-1] in self._renderer.stop_token_ids
        return {"role": "assistant", "content": self._renderer.decode(sample.token_ids[:-1] if closed else sample.token_ids)}


def _finish_reason(answer: ParsedAnswer, sample: Sample) -> FinishReason:
    if sample.truncated:
        return "length"
    return "tool_calls" if answer.tool_calls else "stop"
