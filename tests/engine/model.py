"""A tiny language model: random logits, the same for the same context."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy
from numpy.typing import NDArray


class RandomModel:
    """Its next-token distribution is drawn from a hash of the whole context, so a record with one wrong token cannot agree."""

    def __init__(self, vocabulary_size: int, favoured: Iterable[int]) -> None:
        """`favoured` tokens are likelier than others: such as end turns and begin calls, or random text would have neither."""
        self._size = vocabulary_size
        self._favoured = list(favoured)

    def logprobs(self, context: Sequence[int], temperature: float = 1.0) -> NDArray[numpy.float64]:
        """Natural logarithms of the next token's probabilities, shape (vocabulary_size,)."""
        digest = hashlib.blake2b(array("I", context).tobytes(), digest_size=8).digest()
        logits = numpy.random.default_rng(int.from_bytes(digest)).normal(0.0, 1.5, self._size)
        logits[self._favoured] += 4.0
        logits /= temperature
        normaliser: float = numpy.log(numpy.exp(logits - logits.max()).sum()) + logits.max()
        return logits - normaliser
