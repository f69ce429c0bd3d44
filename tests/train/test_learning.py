"""The whole chain learns: environment, `run-api`, trainer and a Tinker-compatible service, on CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.train.demonstration import learn, rise

pytest.importorskip("torch")
pytest.importorskip("tinker")

SEEDS = (0, 1, 2)


async def test_the_mean_reward_rises(tmp_path: Path) -> None:
    """A short run with large steps, which gets half of the reward as a rule; without training it varies by 0.03."""
    assert_risen([await learn(tmp_path, SEEDS[0], steps=16, learning_rate=0.003)], least=0.1)


# A minute and a half on a machine of two cores that does nothing else.
@pytest.mark.heavy
@pytest.mark.timeout(900)
async def test_the_mean_reward_rises_with_every_seed(tmp_path: Path) -> None:
    assert_risen(await asyncio.gather(*(learn(tmp_path / str(seed), seed) for seed in SEEDS)), least=0.3)


def assert_risen(curves: list[list[float]], least: float) -> None:
    shown = [" ".join(f"{reward:.2f}" for reward in rewards) for rewards in curves]
    assert all(rise(rewards) >= least for rewards in curves), "\n".join(shown)
