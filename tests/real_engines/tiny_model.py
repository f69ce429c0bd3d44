"""A tiny language model with random weights, for engines that want a real one: Qwen3's architecture, in memory and as GGUF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.engine.tokenizer import token_ids

FAVOURED = ("<|im_end|>", "<tool_call>", "</tool_call>")
FAVOURED_LOGIT = 5.0
"""Their logit on average. That of the others is about 0, with a standard deviation of 2."""

CONTEXT = 8192


class TinyModel:
    """In float32. Its weights are large enough for every token of the context to count, and it likes to end turns and to call,
    for random text would have neither."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int = 5) -> None:
        self._tokenizer = tokenizer
        self.config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=CONTEXT,
            initializer_range=0.25,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Qwen3ForCausalLM(self.config).eval()
        with torch.no_grad():
            self._favour(token_ids(tokenizer, *FAVOURED))

    def _favour(self, tokens: list[int]) -> None:
        # A direction that all hidden states share, for the output layer to know its favourites by.
        self.network.model.embed_tokens.weight[:, 0] += 4.0
        everything = torch.arange(self.config.vocab_size).unsqueeze(0)
        shared = self.network.model(everything).last_hidden_state[0].mean(dim=0)
        rows = self.network.lm_head.weight[tokens]
        missing = FAVOURED_LOGIT - rows @ shared
        self.network.lm_head.weight[tokens] = rows + missing.outer(shared) / shared.dot(shared)

    def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """Of all tokens at each place but the first, given those before it, from one forward pass.

        Shape (len(tokens) - 1, vocabulary), float64.
        """
        with torch.no_grad():
            logits: torch.Tensor = self.network(torch.tensor([list(tokens)])).logits[0, :-1].double()
        return torch.log_softmax(logits / temperature, dim=-1)

    def write_gguf(self, path: Path) -> None:
        """Write model and tokenizer as llama.cpp reads them, in float32: token ids stay the same."""
        writer = gguf.GGUFWriter(path, "qwen3")
        self._add_hyperparameters(writer)
        _add_tokenizer(writer, self._tokenizer)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, self.config.num_hidden_layers)
        for name, tensor in self.network.state_dict().items():
            known_as = names.get_name(name, try_suffixes=(".weight",))
            assert known_as is not None, name
            writer.add_tensor(known_as, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _add_hyperparameters(self, writer: gguf.GGUFWriter) -> None:
        writer.add_name("tiny")
        writer.add_block_count(self.config.num_hidden_layers)
        writer.add_context_length(self.config.max_position_embeddings)
        writer.add_embedding_length(self.config.hidden_size)
        writer.add_feed_forward_length(self.config.intermediate_size)
        writer.add_head_count(self.config.num_attention_heads)
        writer.add_head_count_kv(self.config.num_key_value_heads)
        writer.add_key_length(self.config.head_dim)
        writer.add_value_length(self.config.head_dim)
        writer.add_rope_freq_base(self.config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(self.config.rms_norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    types = [gguf.TokenType.NORMAL] * len(tokens)
    for id, token in tokenizer.added_tokens_decoder.items():
        types[id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
