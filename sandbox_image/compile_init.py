"""Compiles the init of a box, where there is a C compiler.

    python -m sandbox_image.compile_init

Puts `libinit.so` beside `init.c`. Boxes use it if it is there and the shell of this machine loads it, and otherwise init.py,
which does the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("init.c")
LIBRARY = SOURCE.with_name("libinit.so")


def compile_init() -> str | None:
    """Compile it; returns the reason if that fails."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "there is no C compiler"
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent, prefix=".compile-") as folder:
        made = Path(folder) / LIBRARY.name
        command = [compiler, "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(made), str(SOURCE)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return done.stderr.strip()
        made.chmod(0o755)
        os.replace(made, LIBRARY)
    return None


def works(library: Path) -> bool:
    """Whether it is there and the shell of this machine loads it."""
    if not library.exists():
        return False
    environment = {"LD_PRELOAD": str(library), "PATH": os.defpath}
    # Without the library, which a static shell does not load, the shell exits with status 1.
    asked = subprocess.run(
        ["/bin/sh", "-c", "exit 1"], env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    return asked.returncode == 0


if __name__ == "__main__":
    problem = compile_init()
    if problem is not None:
        sys.exit(f"the init was not compiled, boxes will run the Python one: {problem}")
