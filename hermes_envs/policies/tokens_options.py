"""The options of policy `tokens`, apart from it: importing an engine's client takes seconds, reading a config must not."""

from __future__ import annotations

from pydantic import Field

from hermes_envs.policies.base import SamplingOptions


class TokensOptions(SamplingOptions):
    """How exact rollouts are rendered and how long they may get."""

    max_context_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of prompt and answer together; none: agent_max_tokens limits each turn."
    )
    renderer: str = Field(
        default="auto", description="The model family's renderer, e.g. qwen3; auto: by the tokenizer's name or chat template."
    )
