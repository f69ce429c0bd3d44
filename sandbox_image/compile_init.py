"""Compiles the loop of a box's init, for where a C compiler is at hand.

    python -m sandbox_image.compile_init

Puts `init_loop` beside `init_loop.c`. Boxes use it if it is there, and the loop of init.py, which does the same, if not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("init_loop.c")
PROGRAM = SOURCE.with_suffix("")


def compile_init() -> str | None:
    """Compile it; None when that worked, else why it did not."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "there is no C compiler"
    with tempfile.TemporaryDirectory(dir=PROGRAM.parent, prefix=".compile-") as folder:
        made = Path(folder) / PROGRAM.name
        # Linked statically it starts faster, and in any container; not every compiler has what that takes.
        for linking in (["-static"], []):
            command = [compiler, "-O2", "-Wall", "-Wextra", *linking, "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.chmod(0o755)
                os.replace(made, PROGRAM)
                return None
    return done.stderr.strip()


if __name__ == "__main__":
    problem = compile_init()
    if problem is not None:
        sys.exit(f"the init was not compiled, boxes will run the Python one: {problem}")
