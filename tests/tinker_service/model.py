"""A decoder-only transformer of a few hundred thousand parameters, and the keys and values that it keeps while it samples."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class TinyModelOptions(BaseModel):
    """What a tiny model looks like before any training. The same options give the same weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary_size: Annotated[int, Field(ge=1)]
    hidden: Annotated[int, Field(ge=1)] = 64
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 4
    context_length: Annotated[int, Field(ge=2)] = 1024
    """The longest sequence, prompt and completion together."""
    initial_scale: Annotated[float, Field(gt=0)] = 0.1
    """Standard deviation of the initial weights. Much smaller ones learn slowly: every logit starts near zero."""
    initial_bias: dict[int, float] = {}
    """Logits that the output layer adds to tokens at first, so that an untrained model says them more often."""
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> TinyModelOptions:
        if self.hidden % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide hidden ({self.hidden})")
        if any(not 0 <= token < self.vocabulary_size for token in self.initial_bias):
            raise ValueError(f"initial_bias must be of ids below vocabulary_size ({self.vocabulary_size})")
        return self


class KeysAndValues:
    """What attention has computed for the positions seen so far, for each layer and sequence."""

    def __init__(self, options: TinyModelOptions, sequences: int, capacity: int) -> None:
        shape = (options.layers, sequences, options.heads, capacity, options.hidden // options.heads)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)

    def extend(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Note keys and values at `positions`, shape (sequences, new tokens); return those of all positions."""
        rows = torch.arange(positions.shape[0])[:, None]
        self._keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self._values[layer][rows, :, positions] = values.transpose(1, 2)
        return self._keys[layer], self._values[layer]

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but those at the indices `rows`."""
        self._keys, self._values = self._keys[:, rows], self._values[:, rows]


class Block(nn.Module):
    """Attention, then two dense layers, each with a normalisation before it and a residual connection around it."""

    def __init__(self, options: TinyModelOptions, layer: int) -> None:
        super().__init__()
        self._heads, self._layer = options.heads, layer
        self.attention_norm = nn.LayerNorm(options.hidden)
        self.attention_in = nn.Linear(options.hidden, 3 * options.hidden)
        self.attention_out = nn.Linear(options.hidden, options.hidden)
        self.dense_norm = nn.LayerNorm(options.hidden)
        self.dense_in = nn.Linear(options.hidden, 4 * options.hidden)
        self.dense_out = nn.Linear(4 * options.hidden, options.hidden)

    def forward(self, states: Tensor, positions: Tensor, past: KeysAndValues | None) -> Tensor:
        batch, length, hidden = states.shape
        queries, keys, values = self.attention_in(self.attention_norm(states)).chunk(3, dim=-1)
        queries, keys, values = (
            part.view(batch, length, self._heads, hidden // self._heads).transpose(1, 2) for part in (queries, keys, values)
        )
        if past is None:
            attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            keys, values = past.extend(self._layer, positions, keys, values)
            visible = torch.arange(keys.shape[2]) <= positions[:, None, :, None]
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        states = states + self.attention_out(attended.transpose(1, 2).reshape(batch, length, hidden))
        return states + self.dense_out(gelu(self.dense_in(self.dense_norm(states))))


class TinyModel(nn.Module):
    """Embeddings of tokens and positions, blocks, and an output layer of its own."""

    def __init__(self, options: TinyModelOptions) -> None:
        super().__init__()
        self.options = options
        self.tokens = nn.Embedding(options.vocabulary_size, options.hidden)
        self.positions = nn.Embedding(options.context_length, options.hidden)
        self.blocks = nn.ModuleList(Block(options, layer) for layer in range(options.layers))
        self.norm = nn.LayerNorm(options.hidden)
        self.output = nn.Linear(options.hidden, options.vocabulary_size)
        generator = torch.Generator().manual_seed(options.seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Embedding | nn.Linear):
                    module.weight.normal_(0.0, options.initial_scale, generator=generator)
                if isinstance(module, nn.Linear):
                    module.bias.zero_()
            for token, logit in options.initial_bias.items():
                self.output.bias[token] = logit

    def forward(self, tokens: Tensor, positions: Tensor, past: KeysAndValues | None = None) -> Tensor:
        """The states over `tokens` and `positions`, both of shape (sequences, length): (sequences, length, hidden).

        Without `past` the sequences are whole, padded at the end. With it they are what comes next at their positions.
        `output` turns states into logits.
        """
        states = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            states = block(states, positions, past)
        normalised: Tensor = self.norm(states)
        return normalised


def padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and positions of `sequences`, zeros after the end of the shorter ones: two tensors (sequences, longest)."""
    length = max(len(sequence) for sequence in sequences)
    tokens = torch.tensor([sequence + [0] * (length - len(sequence)) for sequence in sequences])
    return tokens, torch.arange(length).expand(len(sequences), length)
