"""Runs a Python module as a program."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from backends.teardown import finish
from hermes_envs.errors import TaskBuildError


async def run_module(*arguments: str, timeout_s: float) -> tuple[int, list[str]]:
    """Run `python -m ARGUMENTS` with this interpreter; returns its exit code and the lines that it wrote.

    On cancellation it is killed, with whatever it started.

    Raises:
        TaskBuildError: it takes too long.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        raise TaskBuildError(f"{' '.join(arguments[:2])} took longer than {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await finish(process.wait())
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return process.returncode or 0, lines
