"""Work on values that may be very large, in pieces.

The interpreter runs one thread at a time, and a call of a C function is not interrupted: encoding 64 MiB in one call stops the
event loop even from another thread. These functions are for such a thread: between two pieces the event loop can run.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import heapq
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

_Item = TypeVar("_Item")

# A multiple of 3 and of 4, so that base64 can be cut there.
_SIZE = 12 * 16384
"""Bytes or characters of a piece: about a quarter of a millisecond of work."""
_ITEMS = 1000
_SMALL = 1 << 20
"""Bytes or characters that the event loop's thread handles itself."""
_SORTED_ITEMS = 10_000


async def offload(size: int, work: Callable[[], _Item]) -> _Item:
    """Do work on a value of this size: in a thread, unless it is small."""
    return work() if size <= _SMALL else await asyncio.to_thread(work)


async def fill(descriptor: int, *parts: bytes) -> None:
    """Write an empty file in memory."""
    size = 0
    for part in parts:
        for start in range(0, len(part), _SMALL):
            if start:
                await asyncio.sleep(0)
            size += os.pwrite(descriptor, memoryview(part)[start : start + _SMALL], size)


def encode_base64(content: bytes) -> str:
    """`content` as base64."""
    return "".join(base64.b64encode(piece).decode("ascii") for piece in _slices(memoryview(content)))


def decode_base64(text: str) -> bytes:
    """What `text` stands for.

    Raises:
        ValueError: it is not base64.
    """
    *head, last = _slices(text) or [""]
    if any(piece.endswith("=") for piece in head):
        raise ValueError("Excess data after padding")
    return b"".join(base64.b64decode(piece, validate=True) for piece in (*head, last))


def encode_text(text: str) -> bytes:
    """`text` as UTF-8; surrogates that stand for bytes become these bytes.

    Raises:
        UnicodeEncodeError: other surrogates; with their position in the whole text.
    """
    try:
        return b"".join(piece.encode("utf-8", "surrogateescape") for piece in _slices(text))
    except UnicodeEncodeError:
        # For the position.
        return text.encode("utf-8", "surrogateescape")


def decode_text(content: bytes) -> str:
    """UTF-8 as text.

    Raises:
        UnicodeDecodeError: it is not UTF-8; with the position in the whole content.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return "".join([*(decoder.decode(piece) for piece in _slices(memoryview(content))), decoder.decode(b"", final=True)])
    except UnicodeDecodeError:
        # For the position.
        return content.decode("utf-8")


def encode_json(value: object) -> list[bytes]:
    """`value` as `json.dumps` has it, in pieces. Texts and lists may be long, but not the items of a long list."""
    return [piece.encode("ascii") for piece in _json(value)]


def smallest(items: Iterable[_Item], limit: int, key: Callable[[_Item], Any] | None = None) -> list[_Item]:
    """The first `limit` of the items in ascending order; holds about twice as many at a time."""
    pending = iter(items)
    runs: list[list[_Item]] = []
    held = 0
    while run := sorted(itertools.islice(pending, _SORTED_ITEMS), key=cast(Any, key)):
        runs.append(run)
        held += len(run)
        if held > 2 * max(limit, _SORTED_ITEMS):
            runs = [_merged(runs, limit, key)]
            held = len(runs[0])
    return _merged(runs, limit, key)


def _merged(runs: list[list[_Item]], limit: int, key: Callable[[_Item], Any] | None) -> list[_Item]:
    return list(itertools.islice(heapq.merge(*runs, key=cast(Any, key)), limit))


def _slices(value: Any) -> list[Any]:
    return [value[start : start + _SIZE] for start in range(0, len(value), _SIZE)]


def _json(value: object) -> Iterator[str]:
    if isinstance(value, str):
        # Each character is encoded by itself.
        yield from ('"', *(json.dumps(piece)[1:-1] for piece in _slices(value)), '"')
    elif isinstance(value, list):
        yield "["
        for start in range(0, len(value), _ITEMS):
            yield (", " if start else "") + json.dumps(value[start : start + _ITEMS])[1:-1]
        yield "]"
    elif isinstance(value, dict):
        yield "{"
        for number, (name, item) in enumerate(value.items()):
            yield f"{', ' if number else ''}{json.dumps(name)}: "
            yield from _json(item)
        yield "}"
    else:
        yield json.dumps(value)
