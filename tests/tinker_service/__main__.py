"""Runs the service: `python -m tests.tinker_service --model-folder DIR --port P [--seed N]`.

The folder holds a tokenizer and, where the defaults do not do, the model's options in `model.json`; its name as given is the
base model's, and checkpoints are kept in its subfolder `checkpoints`. Prints {"ready": true, "port": P} when it listens, and
ends on SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.tinker_service.model import TinyModelOptions
from tests.tinker_service.service import TinkerService


def read_service(arguments: argparse.Namespace) -> TinkerService:
    """The service that the command line asks for."""
    folder: Path = arguments.model_folder
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    file = folder / "model.json"
    options = {"vocabulary_size": len(tokenizer)} | (json.loads(file.read_text()) if file.exists() else {})
    if arguments.seed is not None:
        options["seed"] = arguments.seed
    return TinkerService(
        TinyModelOptions.model_validate(options),
        tokenizer,
        model_name=str(folder),
        checkpoint_folder=folder / "checkpoints",
        port=arguments.port,
    )


async def serve(service: TinkerService) -> None:
    """Serve until a signal says to end."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with service:
        sys.stdout.write(json.dumps({"ready": True, "port": service.port}) + "\n")
        sys.stdout.flush()
        await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tinker_service")
    parser.add_argument("--model-folder", type=Path, required=True, help="a tokenizer's folder, with or without model.json")
    parser.add_argument("--port", type=int, default=0, help="0 for any free one")
    parser.add_argument("--seed", type=int, help="of the model's first weights; beats model.json")
    asyncio.run(serve(read_service(parser.parse_args())))


if __name__ == "__main__":
    main()
