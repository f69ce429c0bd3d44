"""Tokenizers with a family's special tokens and chat template, made on the spot: byte-level BPE with a few hundred merges."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.engine.families import FAMILIES, TEMPLATES, Family

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TEXT = """
You are a careful engineer. You may call one or more functions to assist with the user query. List the files of the
repository, read the tests, find the bug and repair it. For each function call, return a json object with function name and
arguments. {"name": "bash", "arguments": {"command": "python -m pytest -q tests"}} passed
{"name": "read_file", "arguments": {"path": "src/package/module.py"}} {"name": "write_file", "arguments": {"path": "a",
"content": "def function(value):\\n    return value + 1\\n"}} "type": "function" "parameters": {"type": "object",
"properties": "required" assert function(1) == 2, "expected another value"
"""


def make_tokenizer(folder: Path, family: Family = FAMILIES[0]) -> PreTrainedTokenizerFast:
    """Write a tokenizer into `folder`, for `AutoTokenizer.from_pretrained(folder)`, and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=560, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.tags])
    templates = {name: (TEMPLATES / file).read_text() for name, file in family.templates.items()}
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.special[0],
        pad_token=family.special[1],
        chat_template=templates["default"] if list(templates) == ["default"] else templates or None,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    fast.name_or_path = str(folder)
    return fast


def token_ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    """The ids of tokens by their names."""
    found = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(found, list)
    return found


def byte_tokens(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """One token for each byte: a way to say a text that the tokenizer itself would never choose, broken UTF-8 included."""
    # Byte-level BPE writes a byte as a printable character: itself where it is one, else from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}
    return token_ids(tokenizer, *(letters[byte] for byte in data))
