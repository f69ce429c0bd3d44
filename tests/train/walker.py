"""A model for `walk`: a tokenizer in which a whole call is one token, and weights of which a few words come easily."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hermes_envs.rendering.choice import create_chat_renderer
from hermes_envs.tools.toolsets import Toolsets
from tests.train.walk import DIRECTIONS, PROMPT, command

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
TOOLSET = ["terminal"]
# How much more often an untrained model says a call, and ends its turn, than any other token.
CALL_BIAS, END_BIAS = 5.5, 6.5


def make_walker(folder: Path) -> None:
    """Write a tokenizer and the options of a tiny model into a folder, for `python -m tests.tinker_service`."""
    tokenizer = _tokenizer(())
    tokenizer = _tokenizer([*_texts_of_the_prompt(tokenizer), *map(call, DIRECTIONS)])
    tokenizer.save_pretrained(folder)
    calls = tokenizer.convert_tokens_to_ids([call(direction) for direction in DIRECTIONS])
    bias = {str(token): CALL_BIAS for token in calls} | {str(tokenizer.convert_tokens_to_ids("<|eot_id|>")): END_BIAS}
    options = {"vocabulary_size": len(tokenizer), "context_length": 256, "initial_scale": 0.05, "initial_bias": bias}
    (folder / "model.json").write_text(json.dumps(options))


def call(direction: str) -> str:
    """A call as Llama 3 writes it."""
    return json.dumps({"name": "terminal", "parameters": {"command": command(direction)}})


def _tokenizer(words: list[str] | tuple[()]) -> PreTrainedTokenizerFast:
    """One token for each byte, each special token and each of the words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", clean_up_tokenization_spaces=False
    )


def _texts_of_the_prompt(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What stands between the special tokens of the prompt: each text becomes a token, for a short context."""
    renderer = create_chat_renderer(tokenizer, "llama-3")
    tools = [tool.schema for tool in Toolsets().resolve(TOOLSET, []).values()]
    first = renderer.prompt([{"role": "user", "content": PROMPT}], tools)
    texts = re.split(r"<\|[a-z_]+\|>", renderer.decode(first))
    return sorted({*filter(str.strip, texts), "ipython"}, key=len, reverse=True)
