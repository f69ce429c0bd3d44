"""Runs git so that equal inputs give equal commits on every machine and day: without the user's configuration and identity."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hermes_envs.errors import HermesEnvsError

BRANCH = "main"

_ENVIRONMENT = {
    "PATH": os.defpath,
    "HOME": os.devnull,
    "LC_ALL": "C.UTF-8",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_TERMINAL_PROMPT": "0",
} | {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "hermes-envs"), ("EMAIL", "hermes-envs@localhost"), ("DATE", "2000-01-01T00:00:00 +0000"))
}


def run_git(
    directory: Path,
    *arguments: str,
    error: type[HermesEnvsError],
    timeout_s: float,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
) -> bytes:
    """What git writes when it is run in a directory; `env` is added to its environment.

    Raises:
        HermesEnvsError: git is missing, fails or takes too long, as the given type.
    """
    program = shutil.which("git")
    if program is None:
        raise error("git is not installed")
    try:
        done = subprocess.run(
            [program, "-c", "core.quotePath=false", *arguments],
            cwd=directory,
            env={**_ENVIRONMENT, **(env or {})},
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as reason:
        raise error(f"git {arguments[0]} took longer than {timeout_s:g} s") from reason
    if done.returncode != 0:
        problem = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise error(f"git {arguments[0]} failed: {problem[-1]}")
    return done.stdout
