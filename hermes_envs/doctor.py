"""What works on this machine and what is missing, found out by starting a real slot server."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from backends.errors import SandboxError
from backends.local_server import LocalServer
from sandbox_image.box.defences import BASICS, REMEDIES
from sandbox_image.protocol import Health

_INSTALL = "install it (Debian, Ubuntu: apt-get install {})"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. `remedy` is empty if it holds, or if `detail` says what to do."""

    name: str
    holds: bool
    required: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All that was found."""

    findings: tuple[Finding, ...]

    @property
    def well(self) -> bool:
        """Whether everything that is required holds."""
        return all(finding.holds for finding in self.findings if finding.required)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"well": self.well, "findings": [asdict(finding) for finding in self.findings]}

    def show(self, console: Console) -> None:
        """Print it as a table, with the remedies below."""
        table = Table(box=None, pad_edge=False)
        for title in ("", "", "what was found"):
            table.add_column(title, overflow="fold")
        for finding in self.findings:
            mark = "[green]holds[/]" if finding.holds else "[red]missing[/]" if finding.required else "[yellow]without[/]"
            table.add_row(mark, finding.name, finding.detail)
        console.print(table)
        for remedy in dict.fromkeys(finding.remedy for finding in self.findings if not finding.holds and finding.remedy):
            names = ", ".join(finding.name for finding in self.findings if finding.remedy == remedy)
            console.print(f"\n[bold]{names}[/]: {remedy}", highlight=False, soft_wrap=True)
        console.print("\n[green]all that is required holds[/]" if self.well else "\n[red]something required is missing[/]")


async def examine(required: Sequence[str] = (), data_dir: str | None = None) -> Report:
    """Look at this machine; a slot server runs for a moment, its files in a directory below `data_dir`.

    `required` names defences that have to hold beside the basics of isolation.
    """
    programs = await asyncio.to_thread(_programs)
    try:
        server = await LocalServer.start(slots=1, isolation="bubblewrap", parent=data_dir)
    except SandboxError as error:
        return Report((*programs, Finding("slot server", False, True, str(error))))
    try:
        health = await server.client.health()
    finally:
        await server.stop()
    return Report((*programs, *_findings(health, required)))


def _programs() -> list[Finding]:
    return [
        Finding("Python", True, True, f"{sys.version.split()[0]} at {sys.executable}"),
        _program("bubblewrap", "bwrap", required=True),
        _program("git", "git", required=True),
        _program("tmux", "tmux", flag="-V"),
        _program("gcc", "cc"),
    ]


def _program(package: str, program: str, *, flag: str = "--version", required: bool = False) -> Finding:
    path = shutil.which(program)
    if path is None:
        return Finding(program, False, required, "it is not installed", _INSTALL.format(package))
    asked = subprocess.run([path, flag], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = (asked.stdout or asked.stderr).strip().splitlines()
    works = asked.returncode == 0 and bool(said)
    return Finding(
        program, works, required, said[0] if said else f"{path} says nothing", "" if works else _INSTALL.format(package)
    )


def _findings(health: Health, required: Sequence[str]) -> list[Finding]:
    limits = health.limits
    compiled, overlay, groups = limits["compiled_init"], limits["layers"] == "overlay", limits["cgroups"]
    found = [
        Finding("slot server", True, True, f"version {health.version}, isolation by {health.isolation}"),
        Finding(
            "compiled init",
            compiled,
            False,
            "commands start by forking a loaded shell" if compiled else "boxes run the Python init: slower, and larger",
            "" if compiled else "install a C compiler and run python -m sandbox_image.compile_init",
        ),
        Finding(
            "overlays",
            overlay,
            False,
            "workspaces stand upon layers" if overlay else f"layers are copied: {limits['layers_are_copied_because']}",
            "" if overlay else "a Linux kernel of version 5.11 or newer that lets this user mount overlays",
        ),
        Finding(
            "control groups",
            bool(groups),
            False,
            ", ".join(f"{name} (version {version})" for name, version in groups.items()) or "none may be made",
            "" if groups else REMEDIES["memory_limit"],
        ),
    ]
    for name, defence in health.defences.items():
        remedy = "" if defence["holds"] else REMEDIES.get(name, "")
        found.append(Finding(name, defence["holds"], name in (*BASICS, *required), defence["detail"], remedy))
    return found
