"""Trains the demonstration of docs/training.md with three seeds and draws how the mean reward rises: docs/learning_curve.svg.

python -m scripts.learning_curve
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.train.demonstration import learn, rise

SEEDS = (0, 1, 2)
PICTURE = Path(__file__).parent.parent / "docs" / "learning_curve.svg"
WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLOURS = ("#2563eb", "#d97706", "#059669")


def draw(curves: list[list[float]]) -> str:
    """The curves, one for each seed, as a picture; rewards are from 0 to 1."""
    steps = max(map(len, curves))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for reward in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(reward)
        parts.append(f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{WIDTH - MARGIN}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{reward:g}</text>')
    for step in range(0, steps, 10):
        parts.append(f'<text x="{_x(step, steps):.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">optimiser step</text>')
    parts.append(f'<text x="{MARGIN}" y="{MARGIN - 20}">mean reward, {len(curves)} seeds</text>')
    for rewards, colour in zip(curves, COLOURS, strict=True):
        points = " ".join(f"{_x(step, steps):.1f},{_y(reward):.1f}" for step, reward in enumerate(rewards))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    return "\n".join([*parts, "</svg>", ""])


def _x(step: int, steps: int) -> float:
    return MARGIN + step * (WIDTH - 2 * MARGIN) / max(1, steps - 1)


def _y(reward: float) -> float:
    return HEIGHT - MARGIN - reward * (HEIGHT - 2 * MARGIN)


async def main() -> None:
    """Train one seed after the other; each takes about half a minute."""
    curves = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            curves.append(await learn(Path(folder), seed))
        first, last = curves[-1][0], curves[-1][-1]
        sys.stdout.write(f"seed {seed}: {first:.2f} at first, {last:.2f} at last, a rise of {rise(curves[-1]):.2f}\n")
    PICTURE.write_text(draw(curves), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
