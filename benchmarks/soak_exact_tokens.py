"""Whether rollouts stay exact over thousands of engine calls, in every model family.

    python -m benchmarks.soak_exact_tokens [--calls 20000] [--family NAME ...] [--seed 0]

Run from the checkout: the tokenizers, the engine that keeps the truth and the turns that a model might say are those of the
tests. For each family and each dialect of the engine's protocol, rollouts of ten turns are played through the policy `tokens`:
good calls and garbled ones, truncated turns, broken UTF-8, tool outputs that look like calls or quote special tokens. Then

- every prompt and completion of the engine must stand in the record once, and nothing else
- every logprob must be that of the recorded context, computed again; masked tokens must carry none
- where the family's chat template can be had, first prompts and what stands between two turns must be the template's

Prints what was checked for each family, and exits with 1 where anything does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hermes_envs.errors import HermesEnvsError
from hermes_envs.rendering.choice import create_chat_renderer
from tests.engine.conversations import OUTPUTS, Played, check_against_template, check_record, play
from tests.engine.engine import Dialect, Engine
from tests.engine.families import FAMILIES, Family
from tests.engine.servers import policy_for
from tests.engine.speech import FamilySpeech
from tests.engine.tokenizer import make_tokenizer
from tests.engine.turns import TOOLS, Turns

DIALECTS: tuple[Dialect, ...] = ("sglang", "vllm", "tinker")
TURNS = 10
AT_ONCE = 16
"""Rollouts that are played together, on one engine."""


@dataclass
class Account:
    """What was checked of one family. `mismatches` are the messages of checks that failed."""

    family: str
    renderer: str = ""
    calls: int = 0
    segments: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    mismatches: list[str] = field(default_factory=list)


async def soak_family(family: Family, calls: int, seed: int, folder: Path) -> Account:
    """Play rollouts until the engines have been called `calls` times."""
    tokenizer = make_tokenizer(folder, family)
    renderer = create_chat_renderer(tokenizer, family.option)
    tools = TOOLS if family.tools else []
    turns = Turns(renderer, tools)
    outputs = (*OUTPUTS, renderer.decode(turns.call), renderer.decode(turns.calls))
    account = Account(family.name, renderer.name)
    batch = 0
    while account.calls < calls and len(account.mismatches) < AT_ONCE:
        dialect = DIALECTS[batch % len(DIALECTS)]
        speech = FamilySpeech(tokenizer, turns, seed + batch)
        rollouts = min(AT_ONCE, -(-(calls - account.calls) // TURNS))
        async with Engine(tokenizer, dialect, speech, favoured=[*renderer.stop_texts, *family.tags]) as engine:
            policy = policy_for(engine, tokenizer, agent_max_tokens=100, renderer=family.option)
            numbers = range(seed + batch * AT_ONCE, seed + batch * AT_ONCE + rollouts)
            results = await asyncio.gather(
                *(play(policy, number, tools=tools, turns=TURNS, outputs=outputs) for number in numbers), return_exceptions=True
            )
        played = [result for result in results if isinstance(result, Played)]
        for failure in (result for result in results if isinstance(result, BaseException)):
            if not isinstance(failure, HermesEnvsError):
                raise failure
            account.mismatches.append(f"{type(failure).__name__}: {failure}")
        segments = [segment for one in played for segment in one.conversation.record.segments]
        account.calls += sum(one.conversation.record.engine_calls for one in played)
        account.segments += len(segments)
        note_mismatch(account, lambda engine=engine, segments=segments: check_record(engine, segments))  # type: ignore[misc]
        for one in played if family.templates else ():
            note_mismatch(
                account,
                lambda one=one: account.compared.update(check_against_template(tokenizer, family, renderer, one, tools)),  # type: ignore[misc]
            )
        batch += 1
    return account


def note_mismatch(account: Account, check: Callable[[], None]) -> None:
    """Run a check and note if it fails."""
    try:
        check()
    except AssertionError as failure:
        account.mismatches.append(str(failure))


def table(accounts: list[Account]) -> Iterator[str]:
    """The accounts as lines of text."""
    columns = f"{'calls':>6} {'segments':>8} {'prompts':>8} {'bridges':>8} {'refused':>8} {'mismatches':>10}"
    yield f"{'family':18} {'renderer':17} {columns}"
    for account in accounts:
        compared = [account.compared[what] or "-" for what in ("first prompts", "bridges", "refused")]
        counts = f"{account.calls:6} {account.segments:8} {compared[0]:>8} {compared[1]:>8} {compared[2]:>8}"
        yield f"{account.family:18} {account.renderer:17} {counts} {len(account.mismatches):10}"
    total = sum(account.calls for account in accounts)
    yield f"{'all':36} {total:6} {sum(account.segments for account in accounts):8}"
    yield from (f"{account.family}: {message[:400]}" for account in accounts for message in account.mismatches[:3])


async def soak(families: list[Family], calls: int, seed: int, folder: Path) -> list[Account]:
    """All families, one after the other, with an equal share of the calls."""
    each = -(-calls // len(families))
    return [await soak_family(family, each, seed, folder / family.name) for family in families]


def main() -> None:
    """Soak and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000, help="engine calls over all families")
    parser.add_argument("--family", action="append", choices=[family.name for family in FAMILIES], help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # The engine refuses nothing here that would be worth a line for each request.
    logging.disable(logging.WARNING)
    families = [family for family in FAMILIES if not given.family or family.name in given.family]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        accounts = asyncio.run(soak(families, given.calls, given.seed, Path(folder)))
    mismatches = sum(len(account.mismatches) for account in accounts)
    sys.stdout.write("\n".join(table(accounts)) + "\n")
    sys.stdout.write(f"{mismatches} mismatches, {time.monotonic() - started:.0f} s\n")
    sys.exit(1 if mismatches else 0)


if __name__ == "__main__":
    main()
