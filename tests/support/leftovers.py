"""What outlives the tests of a process."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.processes import above, below, mentioning

LIBRARIES = ("wandb", "torchinductor")
"""They have directories of their own until the end of the process, or for later ones."""


def leftovers(temporary: Path, base: Path) -> list[str]:
    """Processes that this one has started or that belong to its two folders, mounts in these, and files in `temporary`."""
    texts = (str(temporary), str(base))
    # The command line of this process may name a folder, and so may that of whoever started it.
    known = {os.getpid(), *above(os.getpid())}
    found = [*below(os.getpid()), *(process for text in texts for process in mentioning(text) if process.pid not in known)]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if any(text in line for text in texts)]
    files = [str(path) for path in temporary.iterdir() if not any(library in path.name for library in LIBRARIES)]
    return [*{process.pid: process.command for process in found}.values(), *mounts, *files]
