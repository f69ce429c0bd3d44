"""Samples completions for several requests at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy
import torch
from torch import Tensor

from tests.tinker_service.model import KeysAndValues, TinyModel, padded

# No stop text is longer than the text of so many tokens.
STOP_TEXT_TOKENS = 24


@dataclass(frozen=True)
class SamplingJob:
    """One request: `num_samples` completions of a prompt.

    A `temperature` of 0 takes the likeliest token, a `top_k` of -1 and a `top_p` of 1 leave all tokens in. With
    `score_prompt_from` the prompt's tokens from that index on get logprobs too.
    """

    prompt: list[int]
    num_samples: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    seed: tuple[int, ...]
    score_prompt_from: int | None = None


@dataclass
class Completion:
    """One completion in the making: its tokens with their logprobs, and why it ended (None while it goes on)."""

    job: SamplingJob
    random: numpy.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] | None = None

    def append(self, token: int, logprob: float, decode: Callable[[Sequence[int]], str]) -> None:
        """Take the next token; a token that stops the completion is part of it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        tail = decode(self.tokens[-STOP_TEXT_TOKENS:]) if self.job.stop_texts else ""
        if token in self.job.stop_ids or any(text in tail for text in self.job.stop_texts):
            self.stop_reason = "stop"
        elif len(self.tokens) == self.job.max_tokens:
            self.stop_reason = "length"


@dataclass(frozen=True)
class SamplingResult:
    """A request's completions, and the logprobs of its prompt where they were asked for (nan where there is none)."""

    completions: list[Completion]
    prompt_logprobs: numpy.ndarray | None


@torch.inference_mode()
def sample(model: TinyModel, jobs: Sequence[SamplingJob], decode: Callable[[Sequence[int]], str]) -> list[SamplingResult]:
    """Sample for all `jobs` at once; `decode` gives the text of tokens.

    Logprobs are the model's own, at temperature 1 and with all tokens in. The same job gives the same completions,
    whatever is sampled beside it.
    """
    completions = [[Completion(job, numpy.random.default_rng([*job.seed, n])) for n in range(job.num_samples)] for job in jobs]
    rows = [completion for group in completions for completion in group]
    lengths = torch.tensor([len(row.job.prompt) for row in rows])
    past = KeysAndValues(model.options, len(rows), max(len(job.prompt) + job.max_tokens for job in jobs))
    tokens, positions = padded([row.job.prompt for row in rows])
    states = model(tokens, positions, past)
    firsts = [sum(len(group) for group in completions[:n]) for n in range(len(jobs))]
    prompt_logprobs = [_prompt_logprobs(model, states[first], job) for first, job in zip(firsts, jobs, strict=True)]

    logits, next_positions = model.output(states[torch.arange(len(rows)), lengths - 1]), lengths
    while rows:
        chosen = _choose(logits, rows)
        logprobs = logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
            row.append(token, logprob, decode)
        if any(row.stop_reason for row in rows):
            alive = torch.tensor([n for n, row in enumerate(rows) if row.stop_reason is None], dtype=torch.int64)
            rows = [row for row in rows if row.stop_reason is None]
            chosen, next_positions = chosen[alive], next_positions[alive]
            past.keep(alive)
        if rows:
            states = model(chosen[:, None], next_positions[:, None], past)
            logits, next_positions = model.output(states[:, 0]), next_positions + 1
    return [SamplingResult(group, scored) for group, scored in zip(completions, prompt_logprobs, strict=True)]


def _choose(logits: Tensor, rows: Sequence[Completion]) -> Tensor:
    """The next token of each row, shape (rows,), drawn with one random number of the row's own."""
    temperatures = torch.tensor([[max(row.job.temperature, 1e-6)] for row in rows], dtype=torch.float64)
    scaled = logits / temperatures
    if any(row.job.top_k >= 0 or row.job.top_p < 1 for row in rows):
        scaled = _filtered(scaled, rows)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.tensor([[row.random.random()] for row in rows], dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _filtered(scaled: Tensor, rows: Sequence[Completion]) -> Tensor:
    """Logits with those outside of each row's `top_k` and `top_p` at minus infinity."""
    ordered, order = scaled.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    size = scaled.shape[1]
    top_k = torch.tensor([row.job.top_k if row.job.top_k >= 0 else size for row in rows])
    top_p = torch.tensor([row.job.top_p for row in rows])
    outside = (torch.arange(size) >= top_k[:, None]) | (before >= top_p[:, None])
    return scaled.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)


def _prompt_logprobs(model: TinyModel, states: Tensor, job: SamplingJob) -> numpy.ndarray | None:
    """The logprobs of a prompt's tokens; the first has no context, so none."""
    if job.score_prompt_from is None:
        return None
    prompt = torch.tensor(job.prompt)
    scored = model.output(states[: len(prompt) - 1]).log_softmax(dim=-1).gather(1, prompt[1:, None])[:, 0]
    logprobs = numpy.full(len(prompt), numpy.nan, numpy.float32)
    logprobs[1:] = scored.numpy()
    logprobs[: job.score_prompt_from] = numpy.nan
    return logprobs
