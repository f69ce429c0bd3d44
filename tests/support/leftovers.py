"""What outlives the tests of a process."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.processes import above, below, mentioning


def leftovers(temporary: Path, base: Path) -> list[str]:
    """Processes that this one has started or that belong to its two folders, mounts in these, and files in `temporary`."""
    texts = (str(temporary), str(base))
    # The command line of this process may name a folder, and so may that of whoever started it.
    known = {os.getpid(), *above(os.getpid())}
    found = [*below(os.getpid()), *(process for text in texts for process in mentioning(text) if process.pid not in known)]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if any(text in line for text in texts)]
    # wandb makes two directories when it is imported, and removes them at the end of the process.
    files = [path for path in map(str, temporary.iterdir()) if "wandb" not in path]
    return [*{process.pid: process.command for process in found}.values(), *mounts, *files]
