"""What is recorded is what a real model saw and produced: rollouts on `transformers` and on llama.cpp's server."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.base import TokensOptions
from hermes_envs.policies.token_record import UNTRAINED_MASK, Segment
from hermes_envs.policies.tokens import TokensPolicy
from tests.engine.conversations import Played, as_exchanges, check_against_template, play
from tests.engine.families import FAMILIES
from tests.engine.servers import servers_at
from tests.engine.turns import TOOLS
from tests.real_engines.generate_server import GenerateServer
from tests.real_engines.llama_engine import EXACT_OPTIONS, LlamaEngine
from tests.real_engines.llama_server import llama_server

if TYPE_CHECKING:
    import torch

    from tests.real_engines.tiny_model import TinyModel

pytestmark = pytest.mark.engine

ROLLOUTS, TURNS = 4, 10
TOLERANCE = 1e-4
"""Of logprobs. Both engines have been seen to be within 0.00001 of the forward pass."""


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_the_record_is_what_transformers_saw_and_produced(
    temperature: float, model: TinyModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    from tests.real_engines.transformers_engine import TransformersEngine

    async with TransformersEngine(model) as engine:
        policy = policy_for(engine, tokenizer, temperature)
        rollouts = await play_all(policy)
    check(rollouts, engine, model, tokenizer, policy, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_the_record_is_what_llama_cpp_saw_and_produced(
    temperature: float, gguf_file: Path, model: TinyModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    async with llama_server(gguf_file, *EXACT_OPTIONS) as url, LlamaEngine(url, tokenizer) as engine:
        policy = policy_for(engine, tokenizer, temperature)
        rollouts = await play_all(policy)
    check(rollouts, engine, model, tokenizer, policy, temperature)
    assert engine.recovered > 0, "no token broke a character, for which the engine has a way of its own"


async def test_llama_cpp_samples_from_another_distribution_if_it_may(
    gguf_file: Path, model: TinyModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Why the engine names its samplers: the logprobs are right all the same, and nothing but their sum tells."""
    async with llama_server(gguf_file, *EXACT_OPTIONS) as url, LlamaEngine(url, tokenizer, samplers=None) as engine:
        rollouts = await play_all(policy_for(engine, tokenizer, 1.0))
    segments = segments_of(rollouts)
    assert worst_deviation(model, segments) < TOLERANCE
    assert surprise(model, segments, 1.0) < -10


def policy_for(engine: GenerateServer, tokenizer: PreTrainedTokenizerFast, temperature: float) -> TokensPolicy:
    servers = servers_at(engine.base_url, server_type="sglang")
    return TokensPolicy(servers, tokenizer, TokensOptions(agent_max_tokens=40, agent_temperature=temperature))


async def play_all(policy: TokensPolicy) -> list[Played]:
    async with aclosing(policy):
        return await asyncio.gather(*(play(policy, number, tools=TOOLS, turns=TURNS) for number in range(ROLLOUTS)))


def check(
    rollouts: list[Played],
    engine: GenerateServer,
    model: TinyModel,
    tokenizer: PreTrainedTokenizerFast,
    policy: TokensPolicy,
    temperature: float,
) -> None:
    segments = segments_of(rollouts)
    # Every exchange once and nothing else: no token lost, invented, moved or unmasked twice.
    assert Counter(exchange for segment in segments for exchange in as_exchanges(segment)) == Counter(engine.exchanges)
    assert worst_deviation(model, segments) < TOLERANCE
    assert abs(surprise(model, segments, temperature)) < 5
    compared = sum(
        (check_against_template(tokenizer, FAMILIES[0], policy.renderer, played, TOOLS) for played in rollouts), Counter[str]()
    )
    assert compared["first prompts"] + compared["bridges"] == ROLLOUTS * TURNS
    assert compared["bridges"] >= 8, "hardly a turn continues another"
    assert {turn.finish_reason for played in rollouts for _, turn, _ in played.steps} == {"stop", "tool_calls", "length"}
    check_that_a_wrong_token_shows(model, segments)


def check_that_a_wrong_token_shows(model: TinyModel, segments: list[Segment]) -> None:
    """Even at the beginning of the longest segment, or agreement would mean nothing."""
    longest = max(segments, key=lambda segment: len(segment.tokens))
    tokens = list(longest.tokens)
    tokens[5] += 1
    assert worst_deviation(model, [Segment(tokens, longest.masks, longest.logprobs)]) > 10 * TOLERANCE


def segments_of(rollouts: list[Played]) -> list[Segment]:
    return [segment for played in rollouts for segment in played.conversation.record.segments]


def worst_deviation(model: TinyModel, segments: list[Segment]) -> float:
    """How far recorded logprobs are from those of one forward pass over the segment."""
    return max(
        abs(float(logprobs[token]) - recorded)
        for segment in segments
        for token, mask, recorded, logprobs in places(model, segment, 1.0)
        if mask != UNTRAINED_MASK
    )


def surprise(model: TinyModel, segments: list[Segment], temperature: float) -> float:
    """How much less likely the sampled tokens are than they should be on average, in standard deviations."""
    excess = variance = 0.0
    for segment in segments:
        for token, mask, _, logprobs in places(model, segment, temperature):
            if mask != UNTRAINED_MASK:
                chances = logprobs.exp()
                entropy = -float((chances * logprobs).sum())
                excess += -float(logprobs[token]) - entropy
                variance += float((chances * logprobs**2).sum()) - entropy**2
    return excess / math.sqrt(variance)


def places(model: TinyModel, segment: Segment, temperature: float) -> zip[tuple[int, int, float, torch.Tensor]]:
    """Token, mask, recorded logprob and the model's logprobs of all tokens, at each place but the first."""
    return zip(
        segment.tokens[1:],
        segment.masks[1:],
        segment.logprobs[1:],
        model.logprobs(segment.tokens, temperature),
        strict=True,
    )
