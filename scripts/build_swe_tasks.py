#!/usr/bin/env python3
"""Make repair tasks from the source distributions of packages.

    scripts/build_swe_tasks.py voluptuous==0.16.0 isodate==0.7.2 --output tasks
    python -m hermes_envs.swe_smith process --env.dataset_name tasks --env.policy oracle

PACKAGE is a requirement as pip knows it, or the path of a source distribution. Bugs are put into the package by changing its
syntax tree; those that its own tests tell of become tasks. A task is kept if its fix scores 1 and doing nothing scores 0, twice
each.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from backends.errors import SandboxError
from backends.local import LocalBackend, LocalOptions
from hermes_envs.task_building.package_builder import BuilderOptions
from hermes_envs.task_building.task_set_builder import PackageOutcome, TaskSetBuilder
from hermes_envs.task_building.validation import validate


def main() -> int:
    arguments = parse_arguments()
    output: Path = arguments.output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        sys.stderr.write(f"--output: {output} is not an empty directory\n")
        return 2
    output.mkdir(parents=True, exist_ok=True)
    options = BuilderOptions(per_package=arguments.per_package, seed=arguments.seed, jobs=arguments.jobs)
    try:
        outcomes = asyncio.run(build(arguments.packages, output, options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("interrupted")
    except SandboxError as error:
        sys.exit(str(error))
    Console().print(summary(outcomes))
    return 0 if any(outcome.kept for outcome in outcomes) else 1


def parse_arguments() -> argparse.Namespace:
    defaults = BuilderOptions.model_fields
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", metavar="PACKAGE", nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="a new directory for the tasks")
    for name in ("per_package", "seed", "jobs"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=defaults[name].default, help=defaults[name].description)
    arguments = parser.parse_args()
    for name in ("per_package", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    return arguments


async def build(packages: list[str], output: Path, options: BuilderOptions) -> list[PackageOutcome]:
    current = asyncio.current_task()
    if current is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)
    outcomes = []
    async with LocalBackend(LocalOptions(local_slots=options.jobs)) as backend:
        builder = TaskSetBuilder(options, backend, validate, lambda line: print(line, flush=True))  # noqa: T201
        for package in packages:
            started = time.monotonic()
            outcome = await builder.build(package, output)
            outcome.seconds = time.monotonic() - started
            outcomes.append(outcome)
    return outcomes


def summary(outcomes: list[PackageOutcome]) -> Table:
    table = Table(title="tasks")
    for title in ("package", "kept", "dropped", "seconds", ""):
        table.add_column(title, justify="left" if title in ("package", "") else "right")
    for outcome in outcomes:
        dropped = ", ".join(f"{count} {reason}" for reason, count in outcome.dropped.most_common())
        table.add_row(
            outcome.package,
            str(outcome.kept),
            str(sum(outcome.dropped.values())),
            f"{outcome.seconds:.0f}",
            outcome.problem or dropped,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
