from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import PreTrainedTokenizerFast

from tests.hermes_envs.conftest import tokenizer
from tests.real_engines.llama_server import llama_program

if TYPE_CHECKING:
    from tests.real_engines.tiny_model import TinyModel

__all__ = ["tokenizer"]


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> TinyModel:
    torch = pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("gguf", reason="needs gguf")
    from tests.real_engines.tiny_model import TinyModel

    # On a busy machine several threads wait for each other twenty times as long as a tiny model takes.
    torch.set_num_threads(1)
    return TinyModel(tokenizer)


@pytest.fixture(scope="session")
def gguf_file(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as llama.cpp reads it; there is a server to read it."""
    if shutil.which(llama_program()) is None:
        pytest.skip(f"no program {llama_program()}; HERMES_ENVS_LLAMA_SERVER may name llama.cpp's server")
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    model.write_gguf(path)
    return path
