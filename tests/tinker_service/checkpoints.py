"""Checkpoints in a folder, under the paths that clients know them by: tinker://<model>/<kind>/<name>."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch

from tests.tinker_service.errors import NotFound, RequestRefused

Kind = Literal["weights", "sampler_weights"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Checkpoints:
    """Saves and loads the states of training runs. They outlive the service, if its folder does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, model_id: str, kind: Kind, name: str, state: Mapping[str, Any], *, overwrite: bool) -> str:
        """Write a state and return its path.

        Raises:
            RequestRefused: The name has characters beside letters, digits, `_`, `-` and `.`, or is taken.
        """
        if not _NAME.fullmatch(name):
            raise RequestRefused(f"a checkpoint cannot be named {name!r}: use letters, digits, _, - and .")
        path = f"tinker://{model_id}/{kind}/{name}"
        file = self._file(path)
        if file.exists() and not overwrite:
            raise RequestRefused(f"there is a checkpoint {path} already")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        torch.save(dict(state), partial)
        os.replace(partial, file)
        return path

    def load(self, path: str) -> dict[str, Any]:
        """The state at a path.

        Raises:
            NotFound: There is none.
        """
        file = self._file(path)
        if not file.is_file():
            raise NotFound(f"there is no checkpoint {path}")
        state: dict[str, Any] = torch.load(file, weights_only=True)
        return state

    def _file(self, path: str) -> Path:
        parts = path.removeprefix("tinker://").split("/")
        if len(parts) != 3 or parts[1] not in ("weights", "sampler_weights") or not _NAME.fullmatch(parts[2]):
            raise NotFound(f"{path!r} is not of the form tinker://<model>/weights/<name>")
        return self._folder / quote(parts[0], safe="") / parts[1] / f"{parts[2]}.pt"
