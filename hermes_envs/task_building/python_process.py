"""Runs a Python module as a program."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass

from backends.teardown import finish
from hermes_envs.errors import TaskBuildError


@dataclass(frozen=True)
class FinishedProcess:
    """How a program ended, and the lines that it wrote."""

    exit_code: int
    lines: list[str]


async def run_module(*arguments: str, timeout_s: float) -> FinishedProcess:
    """Run `python -m ARGUMENTS` with this interpreter to its end; whatever it started is killed with it if it is cancelled.

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
    return FinishedProcess(process.returncode or 0, lines)
