from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.engine.tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A Qwen3-like tokenizer; `name_or_path` is the folder that it can be loaded from."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = make_tokenizer(folder)
    made.name_or_path = str(folder)
    return made
