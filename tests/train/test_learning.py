"""The whole chain learns: environment, `run-api`, trainer and a Tinker-compatible service, on CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.train.demonstration import learn, rise

pytest.importorskip("torch")
pytest.importorskip("tinker")

SEEDS = (0, 1, 2)
LEAST_RISE = 0.3


# A minute and a half on a machine of two cores that does nothing else.
@pytest.mark.timeout(900)
async def test_the_mean_reward_rises_with_every_seed(tmp_path: Path) -> None:
    curves = await asyncio.gather(*(learn(tmp_path / str(seed), seed) for seed in SEEDS))
    shown = [" ".join(f"{reward:.2f}" for reward in rewards) for rewards in curves]
    assert all(rise(rewards) >= LEAST_RISE for rewards in curves), "\n".join(shown)
