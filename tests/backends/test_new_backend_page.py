"""The backend of docs/new_backend.md, taken from the page: it works, and the conformance suite runs on it as the page says."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import BackendConfigError, BackendOptions, SandboxUnavailableError, create_tool_backend, options_with
from tests.sandbox_image.running import ROOT, RunningServer, running

NAME = "remote_backend:RemoteBackend"
PART = "tool or command or fresh or layer or artifacts or network or memory or cancelled_call"
"""Some cases of each kind; all of them are run on our own backend."""


@pytest.fixture
def module(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with the page's code in a module."""
    page = (ROOT / "docs/new_backend.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (short_path / "remote_backend.py").write_text(code)
    monkeypatch.syspath_prepend(str(short_path))
    importlib.invalidate_caches()
    yield short_path
    sys.modules.pop("remote_backend", None)


@pytest.fixture
def server(short_path: Path) -> Iterator[RunningServer]:
    """A slot server behind a token, as the page has it."""
    (short_path / "token").write_text("secret\n")
    with running("--port", "0", "--token-file", str(short_path / "token"), slots=4) as server:
        yield server


def test_the_suite_runs_on_it(module: Path, server: RunningServer) -> None:
    options = (f"remote_url=http://127.0.0.1:{server.ready['port']}", f"remote_token_file={module / 'token'}")
    # It is no worker of pytest-xdist, whatever this process is.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", PART, "--backend", NAME),
            *(part for option in options for part in ("--backend-option", option)),
            "tests/backends/test_conformance.py",
        ],
        cwd=ROOT,
        env={**outer, "PYTHONPATH": str(module)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"test_artifacts[{NAME}] PASSED" in done.stdout


async def test_what_it_refuses(module: Path, server: RunningServer) -> None:
    kind = options_with(BackendOptions, NAME)
    with pytest.raises(BackendConfigError, match="remote_url"):
        await create_tool_backend(kind(tool_pool_mode=NAME)).start()
    url = f"http://127.0.0.1:{server.ready['port']}"
    backend = create_tool_backend(kind(tool_pool_mode=NAME, remote_url=url))
    with pytest.raises(SandboxUnavailableError, match="Authorization"):
        await backend.start()
    await backend.stop()


async def test_it_can_be_used_as_the_page_says(module: Path, server: RunningServer) -> None:
    url, token = f"http://127.0.0.1:{server.ready['port']}", module / "token"
    options = options_with(BackendOptions, NAME)(tool_pool_mode=NAME, remote_url=url, remote_token_file=token)
    backend = create_tool_backend(options)
    for _ in range(2):
        async with backend, backend.slot("trajectory") as slot:
            assert (await backend.execute(slot, "bash", {"command": "echo hi"})).output == "hi\n"
