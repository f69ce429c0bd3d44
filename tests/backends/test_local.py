"""What is the local backend's own: its child process, its directory, its options."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

import backends
from backends import BackendConfigError, BackendOptions, create_tool_backend
from tests.support.processes import below
from tests.support.waiting import until

CHECKOUT = Path(backends.__path__[0]).parent

Remains = Callable[[Path], list[str]]


async def busy_parent(data: Path) -> asyncio.subprocess.Process:
    """A process with a backend, in one slot of which a command runs."""
    program = """
        import asyncio, sys
        from backends import BackendOptions, create_tool_backend

        async def main():
            async with create_tool_backend(BackendOptions(local_slots=2, local_data_dir=sys.argv[1])) as backend:
                async with backend.slot("one") as slot:
                    await backend.execute(slot, "write_file", {"path": "file", "content": "x"})
                    print("ready", flush=True)
                    await backend.execute(slot, "bash", {"command": "setsid sleep 1000 & sleep 1000"}, timeout_s=1000)

        asyncio.run(main())
    """
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(program), str(data)),
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdout is not None
    assert await parent.stdout.readline() == b"ready\n"
    # The command is to be running, too.
    await asyncio.sleep(0.5)
    return parent


async def test_nothing_is_left_when_the_parent_is_killed(short_path: Path, remains: Remains) -> None:
    data = short_path / "data"
    parent = await busy_parent(data)
    assert len(remains(data)) >= 3
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await until(lambda: not remains(data))


async def test_what_a_parent_killed_together_with_its_server_leaves_goes_at_the_next_start(
    short_path: Path, remains: Remains
) -> None:
    data = short_path / "data"
    parent = await busy_parent(data)
    [server] = [process for process in below(parent.pid) if "sandbox_image.server" in process.command]
    parent.send_signal(signal.SIGSTOP)
    os.kill(server.pid, signal.SIGKILL)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    [abandoned] = data.iterdir()
    async with create_tool_backend(BackendOptions(local_slots=1, local_data_dir=str(data))) as backend:
        # It could be that of a server which is just starting.
        assert abandoned.exists()
        await backend.stop()
    os.utime(abandoned, (0, 0))
    async with create_tool_backend(BackendOptions(local_slots=1, local_data_dir=str(data))):
        assert not abandoned.exists()
    assert remains(data) == []


async def test_the_way_to_the_server_is_closed_to_others(short_path: Path) -> None:
    async with create_tool_backend(BackendOptions(local_slots=1, local_data_dir=str(short_path))):
        (directory,) = os.listdir(short_path)
        assert stat.S_IMODE(os.stat(short_path / directory / "socket").st_mode) & 0o077 == 0
        assert stat.S_IMODE(os.stat(short_path / directory).st_mode) & 0o022 == 0


def environments_below(directory: Path) -> list[bytes]:
    """The environments of the processes whose command line names the directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(directory).encode() in (process / "cmdline").read_bytes():
                found.append((process / "environ").read_bytes())
        except OSError:
            continue
    return found


async def test_the_server_gets_an_environment_of_its_own(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "open sesame")
    async with create_tool_backend(BackendOptions(local_slots=1, local_data_dir=str(short_path))) as backend:
        environments = environments_below(short_path)
        assert environments
        assert not any(b"open sesame" in environment for environment in environments)
        async with backend.slot("trajectory") as slot:
            result = await backend.execute(slot, "bash", {"command": "env"})
        assert "open sesame" not in result.output


async def test_no_isolation_must_be_asked_for_twice(short_path: Path) -> None:
    with pytest.raises(BackendConfigError, match="require_sandbox"):
        await create_tool_backend(BackendOptions(local_isolation="none", local_data_dir=str(short_path))).start()
    options = BackendOptions(local_isolation="none", require_sandbox=False, local_slots=1, local_data_dir=str(short_path))
    async with create_tool_backend(options) as backend, backend.slot("trajectory") as slot:
        result = await backend.execute(slot, "bash", {"command": "echo hi"})
        assert (result.output, result.metadata["sandboxed"]) == ("hi\n", False)
    assert os.listdir(short_path) == []


async def test_a_server_that_cannot_start_says_why(short_path: Path, remains: Remains, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bubblewrap on PATH the server refuses, and its reason and remedy are the exception's text."""
    monkeypatch.setenv("PATH", str(short_path))
    with pytest.raises(BackendConfigError, match="bubblewrap") as caught:
        await create_tool_backend(BackendOptions(local_slots=1, local_data_dir=str(short_path / "data"))).start()
    assert "\n" not in str(caught.value)
    assert remains(short_path / "data") == []


async def test_a_directory_that_is_too_deep(short_path: Path) -> None:
    with pytest.raises(BackendConfigError, match="local_data_dir"):
        await create_tool_backend(BackendOptions(local_data_dir=str(short_path / ("x" * 100)))).start()
    assert os.listdir(short_path) == []


async def test_a_directory_that_cannot_be_made(short_path: Path) -> None:
    os.close(os.open(short_path / "file", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(BackendConfigError, match="file"):
        await create_tool_backend(BackendOptions(local_data_dir=str(short_path / "file"))).start()


@pytest.mark.parametrize("mode", ["docker", "nomad", "modal"])
def test_modes_that_this_version_lacks(mode: str) -> None:
    with pytest.raises(BackendConfigError, match=f"tool_pool_mode: '{mode}'.*available: local") as caught:
        create_tool_backend(BackendOptions(tool_pool_mode=mode))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"local_slotz": 3},
        {"local_slots": 0},
        {"local_isolation": "chroot"},
        {"acquire_timeout_s": -1},
        {"tool_max_batch_size": 0},
    ],
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(options))):
        BackendOptions(**options)


def test_the_public_names_exist() -> None:
    assert sorted(backends.__all__) == backends.__all__
    assert all(hasattr(backends, name) for name in backends.__all__)
