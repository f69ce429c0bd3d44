"""Attacks by trees that resist their removal, on the name of the workspace, and by files that grow while they are read."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox_image.running import Api, RunningServer, open_directory, running
from tests.security.field import Field, become
from tests.security.table import still_works

LIST, ARCHIVE = "/artifacts/list", "/artifacts/archive"

TREES = {
    "a deep tree": "python3 -c \"import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')\"",
    "closed directories": "mkdir -p a/b/c; touch a/b/c/file; chmod 0 a/b/c a/b a",
    "names that are not text": "mkdir \"$(printf 'a\\377\\nb')\"; touch \"$(printf 'a\\377\\nb/-rf')\" ./-rf ./--",
    "very many files": "mkdir many; cd many; seq 1 2000 | xargs touch",
    "a closed workspace": "touch file; chmod 0 .",
}


@pytest.mark.parametrize("name", TREES)
async def test_a_tree_that_resists_its_removal(field: Field, name: str) -> None:
    """The next trajectory gets an empty workspace at once, whatever the last one left behind."""
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        assert (await api.bash(TREES[name]))["success"]
        for route in (LIST, ARCHIVE):
            status, answer = await api.post(
                route, {"slot_id": "slot_0", "recursive": True} if route == LIST else {"slot_id": "slot_0"}
            )
            assert status in (200, 403, 413), answer
        await api.reset()
        assert await api.output("ls -A | wc -l; touch new; echo $?") == "0\n0\n"


async def test_a_closed_workspace_without_mounts() -> None:
    """Where workspaces are plain directories of the server's user, closing one neither keeps it nor the slot."""
    with running("--isolation", "none", slots=1, other_user=True) as server:
        assert "disk" in str((await health(server))["limits"]["workspaces"])
        api = Api.over(server)
        async with api.session:
            for route, request in (("/reset", {}), ("/layers", {"name": "closed"}), ("/reset", {"layer": "closed"})):
                assert (await api.bash("touch file; chmod 0 ."))["success"]
                status, answer = await api.post(route, {"slot_id": "slot_0", **request})
                assert status == 200, answer
            assert await api.output("ls") == "file\n"


async def health(server: RunningServer) -> dict[str, Any]:
    api = Api.over(server)
    async with api.session:
        return dict((await api.get("/health"))[1])


@pytest.mark.any_user
@pytest.mark.parametrize("name", ["a deep tree", "closed directories"])
def test_the_usual_removal_gives_up(field: Field, name: str) -> None:
    """The control of the test above."""
    with open_directory(other_user=True, memory=True) as directory:
        place = directory / "tree"
        as_nobody = become(65534) if Path("/proc/self").stat().st_uid == 0 else []
        subprocess.run([*as_nobody, "sh", "-c", f"mkdir {place} && cd {place} && {TREES[name]}"], check=True)
        remove = "import shutil, sys; sys.setrecursionlimit(1000); shutil.rmtree(sys.argv[1])"
        done = subprocess.run(
            [*as_nobody, "/usr/bin/python3", "-I", "-c", remove, str(place)], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0, done
        assert place.exists()


async def test_the_workspace_itself_replaced(field: Field) -> None:
    """The name of the workspace does not come to mean another directory."""
    place = field.new_directory(None)
    (place / "workspace").mkdir()
    (place / "workspace").rmdir()
    (place / "workspace").symlink_to(field.grounds)
    assert (place / "workspace" / "secret").read_text() == field.flag
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        replaced = await api.bash(
            f"cd /; rm -rf /workspace; mv /workspace /tmp/w; ln -s {field.grounds} /workspace; rmdir /workspace"
        )
        assert not replaced["success"]
        status, answer = await api.post("/artifacts/read", {"slot_id": "slot_0", "path": "secret"})
        assert (status, field.flag in str(answer)) == (404, False)
    await still_works(field)


async def test_a_file_that_grows_while_it_is_read(field: Field) -> None:
    """The announced size says nothing about how much there is to read."""
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        grow = "while :; do head -c 1M /dev/zero >> file || rm file; done"
        growing = asyncio.create_task(api.bash(grow, timeout=0.7))
        answers = set()
        while not growing.done():
            status, answer = await api.post("/artifacts/read", {"slot_id": "slot_0", "path": "file", "max_bytes": 1_000_000})
            answers.add(status)
            assert status in (200, 404, 413), answer
            assert answer.get("size", 0) <= 1_000_000
        assert 413 in answers
        await growing


def test_growing_files_exist(tmp_path: Path) -> None:
    """The control of the test above: who looks at the size first reads more than that."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    with file.open("rb") as opened:
        size = file.stat().st_size
        with file.open("ab") as more:
            more.write(b"y" * 1000)
        assert len(opened.read()) > size
    shutil.rmtree(tmp_path)
