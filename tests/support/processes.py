"""What is running below a process, as /proc shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process; `command` is its command line with spaces between the arguments."""

    pid: int
    parent: int
    command: str


def processes() -> list[Process]:
    """All processes that are not zombies."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state != "Z":
            found.append(Process(int(folder.name), int(parent), command))
    return found


def below(pid: int) -> list[Process]:
    """The processes that descend from one."""
    everything, found, parents = processes(), [], {pid}
    while parents:
        children = [process for process in everything if process.parent in parents]
        found += children
        parents = {child.pid for child in children}
    return found


def mentioning(text: str) -> list[Process]:
    """The processes whose command line has a text in it."""
    return [process for process in processes() if text in process.command]


def above(pid: int) -> list[int]:
    """The processes that one descends from."""
    parents, found = {process.pid: process.parent for process in processes()}, []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found
