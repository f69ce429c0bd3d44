#!/usr/bin/env python3
"""Record which tests tell of each bug of the shipped tasks; to be run after a change to them."""

from __future__ import annotations

import asyncio
import sys

from backends.errors import SandboxError
from hermes_envs.demo.recording import record_tests
from hermes_envs.errors import HermesEnvsError


def main() -> int:
    try:
        asyncio.run(record_tests(lambda line: sys.stdout.write(f"{line}\n")))
    except (HermesEnvsError, SandboxError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
