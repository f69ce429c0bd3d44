"""The package's own command line: `hermes-envs`, or `python -m hermes_envs`. Environments have command lines of theirs."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from rich.console import Console

from hermes_envs.doctor import examine
from sandbox_image.box.defences import REMEDIES


def main() -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(prog="hermes-envs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what works on this machine, what is missing, and what to do about it")
    doctor.add_argument("--json", action="store_true", help="as a JSON object")
    doctor.add_argument("--data-dir", help="where the workspaces of a local backend would be")
    doctor.add_argument(
        "--require", action="append", default=[], metavar="DEFENCE", choices=list(REMEDIES), help="count it as required"
    )
    given = parser.parse_args()
    report = asyncio.run(examine(given.require, given.data_dir))
    if given.json:
        sys.stdout.write(json.dumps(report.to_json(), indent=2) + "\n")
    else:
        report.show(Console())
    return 0 if report.well else 1


if __name__ == "__main__":
    sys.exit(main())
