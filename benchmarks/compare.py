"""This project beside others that run commands in sandboxes: one command, one run, one table.

    python benchmarks/compare.py [--seconds 200] [--image NAME]

Measures `true` by this project's slot server, SWE-ReX, mini-swe-agent's Bubblewrap and Docker environments and `docker exec`,
and everything beside a bare `posix_spawn` of `sh -c true`. All of them take turns in rounds, each round in another order, so
that a busy machine disturbs all alike. Each caller is a process of its own and has a sandbox of its own.

The peers are installed with pip into a temporary virtual environment, in the versions of `peers.txt`. If no Docker engine is
reachable, one is started (needs root and Debian's `docker.io`), with an image made by `debootstrap` unless `--image` names one.
What cannot run here is left out, with the reason. Nothing stays behind: no process, mount, container or file.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench import BenchError, Measurement, in_processes
from docker_engine import docker_engine
from peers import (
    FEW,
    MANY,
    Way,
    bare_spawn,
    docker_exec,
    hermes_envs,
    installed_peers,
    mini_swe_bubblewrap,
    mini_swe_docker,
    swe_rex,
)

TURN_S = 0.8
INTERRUPTED = 130

Opened = TypeVar("Opened")


@dataclass
class Result:
    """What was measured of one way, and how many of its turns failed."""

    calls: Measurement = field(default_factory=Measurement)
    fresh: list[float] = field(default_factory=list)
    failed: int = 0

    def take_turn(self, way: Way, callers: int | None) -> None:
        """Measure calls by a number of callers, or a fresh sandbox."""
        try:
            if callers is None:
                self.fresh.append(way.fresh())
            else:
                self.calls.add(in_processes(way.work, callers, TURN_S))
        except BenchError as error:
            say(f"a turn of {way.name} failed: {error}")
            self.failed += 1


def attempt(stack: ExitStack, name: str, context: AbstractContextManager[Opened]) -> Opened | None:
    """Open something that may not run here; say why if so."""
    say(f"preparing {name}")
    try:
        return stack.enter_context(context)
    except BenchError as reason:
        say(f"skipped: {name}: {reason}")
        return None


def open_ways(stack: ExitStack, directory: Path, image: str | None) -> tuple[list[Way], str]:
    """All ways that can run here, and what they run on."""
    ways = stack.enter_context(bare_spawn()) + stack.enter_context(hermes_envs(directory))
    peers = attempt(stack, "packages of SWE-ReX and mini-swe-agent", installed_peers(directory / "peers"))
    engine = attempt(stack, "Docker engine", docker_engine(directory / "docker", image))
    if peers is not None:
        ways += attempt(stack, "SWE-ReX", swe_rex(peers)) or []
        ways += attempt(stack, "mini-swe-agent Bubblewrap", mini_swe_bubblewrap(directory)) or []
    if peers is not None and engine is not None:
        ways += attempt(stack, "mini-swe-agent Docker", mini_swe_docker(engine)) or []
    if engine is not None:
        ways += attempt(stack, "docker exec", docker_exec(engine)) or []
    machine = f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    return ways, machine if engine is None else f"{machine}, {engine.description}"


def race(ways: list[Way], seconds: float) -> dict[str, Result]:
    """Let every way have its turns, round after round."""
    results = {way.name: Result() for way in ways}
    turns = [(way, callers) for way in ways for callers in (None, *way.callers)]
    # What the peers' packages have left in this process would slow down the collector in every caller.
    gc.freeze()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        say(f"{left:.0f} s left")
        for way, callers in random.sample(turns, len(turns)):
            results[way.name].take_turn(way, callers)
    return results


def table(ways: list[Way], results: dict[str, Result]) -> str:
    """The results in markdown; ratios are to the first way."""
    unit = results[ways[0].name].calls.p50
    heads = ["way", "isolates", "p50 ms", "x bare", "calls/s, 1", f"calls/s, {FEW}", f"calls/s, {MANY}"]
    rows = [[*heads, "fresh sandbox, ms", "x bare"], ["---"] * 2 + ["---:"] * len(heads)]
    for way in ways:
        result = results[way.name]
        name = f"{way.name} ({result.failed} turns failed)" if result.failed else way.name
        rates = [f"{result.calls.rate(count):.0f}" if count in result.calls.rates else "" for count in (1, FEW, MANY)]
        p50, fresh = (
            [f"{statistics.median(times) * 1000:.2f}", f"{statistics.median(times) / unit:.2f}"] if times else ["", ""]
            for times in (result.calls.alone, result.fresh)
        )
        rows.append([name, way.isolates, *p50, *rates, *fresh])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def say(word: str) -> None:
    """Tell the user what happens."""
    sys.stderr.write(f"compare: {word}\n")


def stop_once(number: int, frame: object) -> None:
    """On a signal: clean up, and let no second one interrupt that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Measure and print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200.0, help="for the rounds; preparing takes about a minute more")
    parser.add_argument("--image", help="a Docker image with /bin/sh and bash that the engine has")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_once)
    try:
        with tempfile.TemporaryDirectory(prefix="compare-") as name, ExitStack() as stack:
            ways, machine = open_ways(stack, Path(name), arguments.image)
            results = race(ways, arguments.seconds)
    except BenchError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    rounds = len(results[ways[0].name].fresh)
    sys.stdout.write(f"{machine}; {rounds} rounds\n\n{table(ways, results)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
