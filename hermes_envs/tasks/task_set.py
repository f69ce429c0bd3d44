"""Reads a set of task rows from wherever a user keeps them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hermes_envs.errors import DatasetError

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskSet:
    """Rows, and the folder they came from if they came from one."""

    rows: list[Row]
    folder: Path | None = None

    @classmethod
    async def load(
        cls,
        name: str,
        split: str,
        cache_directory: Path,
        *,
        subset: str | None = None,
        built_in: Mapping[str, Callable[[Path], Path]] = {},
    ) -> TaskSet:
        """Read a built-in set, a folder with `tasks.jsonl`, a `.jsonl` or `.parquet` file, or a dataset of the hub.

        `subset` names the configuration of a hub dataset that has several. `built_in` are functions by name that write a set
        below the directory that they are given, and return its folder.

        Raises:
            DatasetError: it is not there or malformed; the message names the file and line.
        """
        make = built_in.get(name)
        path = Path(name) if make is None else await asyncio.to_thread(make, cache_directory / name)
        return await asyncio.to_thread(cls._read, path.expanduser(), name, split, subset)

    @classmethod
    def _read(cls, path: Path, name: str, split: str, subset: str | None) -> TaskSet:
        if path.is_dir():
            return cls(_read_jsonl(path / "tasks.jsonl"), path)
        if path.suffix == ".jsonl":
            return cls(_read_jsonl(path), path.parent)
        if path.suffix == ".parquet":
            return cls(_read_parquet(path), path.parent)
        if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise DatasetError(f"dataset_name: {name!r} is no folder, no .jsonl or .parquet file, and no OWNER/NAME of the hub")
        return cls(_read_hub(name, split, subset))


def missing_columns(row: Row, required: Sequence[str]) -> list[str]:
    """The required columns that a row lacks or leaves empty."""
    return [column for column in required if row.get(column) in (None, "", [])]


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DatasetError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
                rows.append(row)
    except OSError as reason:
        raise DatasetError(f"dataset_name: cannot read {path}: {reason.strerror}") from reason
    except UnicodeDecodeError as reason:
        raise DatasetError(f"{path}: not UTF-8: {reason}") from reason
    except json.JSONDecodeError as reason:
        raise DatasetError(f"{path}:{number}: not JSON: {reason}") from reason
    return rows


def _read_parquet(path: Path) -> list[Row]:
    # Most task sets are of another form.
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as reason:
        raise DatasetError(f"dataset_name: cannot read {path}: {reason}") from reason
    return rows


def _read_hub(name: str, split: str, subset: str | None) -> list[Row]:
    # Takes seconds to import, and most task sets are local.
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(name, subset, split=split)]
    except Exception as reason:
        raise DatasetError(f"dataset_name: cannot load {name!r}, split {split!r}: {reason}") from reason
