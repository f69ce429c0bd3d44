"""Runs a module as a program that ends with the process that started it: `python -m hermes_envs.train.child PID MODULE ...`."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for a SIGTERM when the parent PID ends, then be the module."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have ended before the kernel was asked.
    if os.getppid() != parent:
        sys.exit(f"{module}: the process that started this one has ended")
    del sys.argv[:2]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
