"""Trains a tiny model: losses over tokens, their gradients, and Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tests.tinker_service.errors import RequestRefused
from tests.tinker_service.model import TinyModel, padded

# How many tokens, padding included, go through the model at once: bounds the memory of a request with many sequences.
BATCH_TOKENS = 16_384

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]


def _cross_entropy(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    return -logprobs * inputs["weights"]


def _importance_sampling(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    return -(logprobs - inputs["logprobs"]).exp() * inputs["advantages"]


def _ppo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio = (logprobs - inputs["logprobs"]).exp()
    clipped = ratio.clamp(config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2))
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])


@dataclass(frozen=True)
class Loss:
    """A loss for each token, from the logprobs of the target tokens and the inputs beside them; a request's is their sum."""

    function: Callable[[Tensor, Inputs, Config], Tensor]
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    config: frozenset[str] = frozenset()


_POLICY_GRADIENT = frozenset({"target_tokens", "logprobs", "advantages"})

# As https://tinker-docs.thinkingmachines.ai/losses defines them. `weights` and `mask` multiply the losses of tokens.
LOSSES = {
    "cross_entropy": Loss(_cross_entropy, frozenset({"target_tokens", "weights"})),
    "importance_sampling": Loss(_importance_sampling, _POLICY_GRADIENT, frozenset({"weights", "mask"})),
    "ppo": Loss(
        _ppo, _POLICY_GRADIENT, frozenset({"weights", "mask"}), frozenset({"clip_low_threshold", "clip_high_threshold"})
    ),
}


@dataclass(frozen=True)
class Example:
    """A sequence to train on: the model's input, and tensors of the same length that the loss reads."""

    tokens: list[int]
    inputs: Mapping[str, numpy.ndarray]


@dataclass(frozen=True)
class LossResult:
    """The sum of a request's losses, and the logprobs of each example's target tokens."""

    total: float
    logprobs: list[numpy.ndarray]


class TrainingRun:
    """A model in training: its weights, the gradients since the last step, and Adam's moments.

    All weights are trained, where the real service trains a LoRA adapter: the rank is noted, and its seed has no effect, as
    an adapter changes nothing before its first step.
    """

    def __init__(self, model: TinyModel, rank: int) -> None:
        self.rank = rank
        self._model = deepcopy(model).requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self._model.parameters())

    def forward_backward(
        self, examples: Sequence[Example], loss_name: str, config: Config, *, forward_only: bool
    ) -> LossResult:
        """The loss of `examples`; its gradients are added to those since the last step unless `forward_only`.

        Raises:
            RequestRefused: The loss is unknown, does not fit the examples, or is not a finite number.
        """
        loss = self._checked_loss(examples, loss_name, config)
        total, logprobs = 0.0, [numpy.empty(0)] * len(examples)
        gradients = [None if weight.grad is None else weight.grad.clone() for weight in self._model.parameters()]
        for batch in _batches(examples):
            with torch.set_grad_enabled(not forward_only):
                losses = self._losses([examples[n] for n in batch], loss, config, logprobs, batch)
            total += losses.item()
            if not forward_only:
                losses.backward()
        if not numpy.isfinite(total):
            for weight, gradient in zip(self._model.parameters(), gradients, strict=True):
                weight.grad = gradient
            raise RequestRefused(f"the loss is {total}: look for logprobs or advantages that are not finite or far apart")
        return LossResult(total, logprobs)

    def optim_step(
        self, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_clip_norm: float
    ) -> dict[str, float]:
        """Move the weights by one step of AdamW (https://arxiv.org/abs/1711.05101), and forget the gradients.

        A `grad_clip_norm` of 0 clips nothing. Returns the norm of the gradients before clipping.
        """
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), grad_clip_norm or torch.inf)
        for group in self._optimizer.param_groups:
            group.update(lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"grad_norm": float(norm)}

    def snapshot(self) -> TinyModel:
        """A copy of the model as it is now, to sample from."""
        return deepcopy(self._model).requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What `restore` brings back: the weights and Adam's moments, not the gradients since the last step."""
        return {"rank": self.rank, "model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any], *, optimizer: bool) -> None:
        """Take the weights from a `state`, and Adam's moments where `optimizer` says so; else Adam starts anew.

        Raises:
            RequestRefused: The state is of a model of another shape, or has no moments.
        """
        if optimizer and state["optimizer"] is None:
            raise RequestRefused("the checkpoint has no optimizer state: it was saved for samplers")
        try:
            self._model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise RequestRefused(f"the checkpoint does not fit the model: {error}") from error
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._optimizer.zero_grad()
        if optimizer:
            self._optimizer.load_state_dict(state["optimizer"])

    def _losses(
        self, examples: Sequence[Example], loss: Loss, config: Config, logprobs: list[numpy.ndarray], places: Sequence[int]
    ) -> Tensor:
        """The sum of the losses of `examples`; notes the logprobs of each at its place in `logprobs`."""
        states = self._model(*padded([example.tokens for example in examples]))
        rows = torch.cat([states[n, : len(example.tokens)] for n, example in enumerate(examples)])
        inputs = {name: torch.from_numpy(_joined(examples, name)) for name in examples[0].inputs}
        scored = self._model.output(rows).log_softmax(dim=-1).gather(1, inputs["target_tokens"][:, None])[:, 0]
        ends = numpy.cumsum([len(example.tokens) for example in examples])
        for place, part in zip(places, numpy.split(scored.detach().numpy(), ends[:-1]), strict=True):
            logprobs[place] = part
        token_losses = loss.function(scored, inputs, config)
        for name in loss.optional & inputs.keys():
            token_losses = token_losses * inputs[name]
        return token_losses.sum()

    def _checked_loss(self, examples: Sequence[Example], name: str, config: Config) -> Loss:
        if name not in LOSSES:
            raise RequestRefused(f"loss_fn {name!r} is not one of {sorted(LOSSES)}")
        loss = LOSSES[name]
        if unknown := set(config) - loss.config:
            raise RequestRefused(f"loss_fn_config has {sorted(unknown)}; {name} knows {sorted(loss.config)}")
        if not examples:
            raise RequestRefused("no data")
        for n, example in enumerate(examples):
            self._check_example(f"datum {n}", example, name, loss)
        if any(example.inputs.keys() != examples[0].inputs.keys() for example in examples):
            raise RequestRefused("all data of a request must have the same loss_fn_inputs")
        return loss

    def _check_example(self, where: str, example: Example, name: str, loss: Loss) -> None:
        options = self._model.options
        if not 0 < len(example.tokens) <= options.context_length:
            raise RequestRefused(f"{where} has {len(example.tokens)} tokens; 1 to {options.context_length} are possible")
        if missing := loss.required - example.inputs.keys():
            raise RequestRefused(f"{where} lacks loss_fn_inputs {sorted(missing)}, which {name} needs")
        if unknown := example.inputs.keys() - loss.required - loss.optional:
            raise RequestRefused(f"{where} has loss_fn_inputs {sorted(unknown)}, which {name} does not know")
        for key, value in example.inputs.items():
            if value.shape != (len(example.tokens),):
                raise RequestRefused(f"{where}: {key} has shape {value.shape}, the model input {len(example.tokens)} tokens")
        targets = example.inputs["target_tokens"]
        if targets.dtype != numpy.int64:
            raise RequestRefused(f"{where}: target_tokens must be int64")
        ids = [*example.tokens, *targets.tolist()]
        if min(ids) < 0 or max(ids) >= options.vocabulary_size:
            raise RequestRefused(f"{where} has a token id outside of the vocabulary of {options.vocabulary_size}")


def _joined(examples: Sequence[Example], name: str) -> numpy.ndarray:
    return numpy.concatenate([example.inputs[name] for example in examples])


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Indices of examples of similar length, as many as fit into `BATCH_TOKENS`; at least one."""
    batch: list[int] = []
    for n in sorted(range(len(examples)), key=lambda n: len(examples[n].tokens)):
        if batch and (len(batch) + 1) * len(examples[n].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(n)
    yield batch
