"""Reading, listing and packing what is in a workspace."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import tarfile
from typing import Any

import pytest

from sandbox_image.tools.artifacts import MAX_UNPACKED_BYTES
from tests.sandbox_image.running import Api, RunningServer

pytestmark = pytest.mark.any_user


async def ask(api: Api, route: str, **fields: Any) -> tuple[int, Any]:
    return await api.post(f"/artifacts/{route}", {"slot_id": "slot_0", **fields})


async def test_read(api: Api) -> None:
    await api.output("printf 'zwölf' > file; ln -s file link")
    expected = {"content": "zwölf", "encoding": "text", "size": 6, "sha256": None}
    assert await ask(api, "read", path="file") == (200, expected)
    assert await ask(api, "read", path="/workspace/link") == (200, expected)
    digest = hashlib.sha256("zwölf".encode()).hexdigest()
    assert await ask(api, "read", path="file", include_sha256=True) == (200, {**expected, "sha256": digest})
    assert (await ask(api, "read", path="file", max_bytes=6))[0] == 200
    status, failure = await ask(api, "read", path="file", max_bytes=5)
    assert (status, failure["kind"]) == (413, "too_large")
    assert (await ask(api, "read", path="file", encoding="base64"))[1]["content"] == base64.b64encode("zwölf".encode()).decode()
    await api.output("printf '\\377' > file")
    assert (await ask(api, "read", path="file"))[0] == 400


UNREADABLE = [
    ("missing", 404), ("file/below", 404), ("dangling", 404), ("circle", 404), ("x" * 300, 404), ("gone/../file", 404),
    ("/etc/passwd", 403), ("..", 403), ("../root", 403), ("out", 403), ("out_dir/passwd", 403), ("directory", 403),
    (".", 403), ("fifo", 403), ("a\nb", 404), ("/proc/1/environ", 403), ("a\0b", 400), ("\ud800", 400), ("y" * 5000, 400),
]  # fmt: skip


@pytest.mark.both_users
async def test_what_cannot_be_read(api: Api) -> None:
    await api.output(
        "mkdir directory; echo x > file; ln -s nothing dangling; ln -s circle circle; ln -s /etc/passwd out;"
        "ln -s /etc out_dir; mkfifo fifo"
    )
    for path, status in UNREADABLE:
        answered, failure = await ask(api, "read", path=path)
        assert answered == status, (path, failure)
        assert "\n" not in failure["error"]


async def test_device_files_are_not_read(api: Api, server: RunningServer) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a device file needs root")
    if os.stat(f"/proc/{server.process.pid}").st_uid != 0:
        pytest.skip("nobody can make a device file in a workspace that an ordinary user has mounted")
    os.mknod(server.workspace() / "zero", 0o20666, os.makedev(1, 5))
    assert (await ask(api, "read", path="zero"))[0] == 403
    result = await api.tool("read_file", {"path": "zero"})
    assert result["error"] in ("zero: not a regular file", "zero: Permission denied")


async def test_list(api: Api) -> None:
    await api.output(
        "mkdir -p a/b; echo x > a/b/file; echo y > a.txt; ln -s /etc etc; mkfifo fifo; chmod 600 a.txt; mkdir empty"
    )
    status, listing = await ask(api, "list")
    assert (status, listing["truncated"]) == (200, False)
    assert [(entry["path"], entry["type"]) for entry in listing["entries"]] == [
        ("a", "directory"), ("a.txt", "file"), ("empty", "directory"), ("etc", "symlink"), ("fifo", "other"),
    ]  # fmt: skip
    assert listing["entries"][1] == {"path": "a.txt", "type": "file", "size": 2, "mode": 0o600}
    _, deep = await ask(api, "list", recursive=True)
    assert [entry["path"] for entry in deep["entries"]] == ["a", "a.txt", "a/b", "a/b/file", "empty", "etc", "fifo"]
    _, short = await ask(api, "list", recursive=True, max_entries=3)
    assert ([entry["path"] for entry in short["entries"]], short["truncated"]) == (["a", "a/b", "a/b/file"], True)
    for path, expected in (("etc", 403), ("missing", 404), ("a.txt", 404), ("/", 403)):
        assert (await ask(api, "list", path=path))[0] == expected
    assert (await ask(api, "list", max_entries=0))[0] == 400


async def test_names_that_are_not_text_survive(api: Api) -> None:
    await api.output("printf content > \"$(printf 'a\\377b')\"; touch \"$(printf 'new\\nline')\"")
    _, listing = await ask(api, "list")
    names = [entry["path"] for entry in listing["entries"]]
    assert names == ["a\udcffb", "new\nline"]
    assert (await ask(api, "read", path=names[0]))[1]["content"] == "content"


async def test_trees_that_are_too_much(api: Api) -> None:
    await api.output(
        "python3 -c \"import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')\";"
        "mkdir many; cd many; seq 1 1000 | xargs touch"
    )
    status, listing = await ask(api, "list", recursive=True)
    assert (status, listing["truncated"]) == (200, True)
    assert len(listing["entries"]) == 128 + 1001
    assert (await ask(api, "archive"))[0] == 413
    status, listing = await ask(api, "list", path="many", max_entries=10)
    assert [entry["path"] for entry in listing["entries"]] == sorted(map(str, range(1, 1001)))[:10]
    assert (await ask(api, "archive", path="many", max_entries=999))[0] == 413
    assert (await ask(api, "archive", path="many"))[1]["entries"] == 1000


async def test_archive(api: Api) -> None:
    await api.output(
        "mkdir -p top/sub; echo x > top/sub/run; chmod 755 top/sub/run; ln -s /etc/passwd top/link; mkfifo top/fifo;"
        "ln top/sub/run top/hard"
    )
    status, archive = await ask(api, "archive", path="top")
    content = base64.b64decode(archive["content"])
    assert (status, archive["size"], archive["entries"]) == (200, len(content), 4)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        members = {member.name: member for member in tar}
        assert sorted(members) == ["hard", "link", "sub", "sub/run"]
        assert (members["sub/run"].mode, members["link"].linkname, members["link"].issym()) == (0o755, "/etc/passwd", True)
        assert {(member.uid, member.uname) for member in members.values()} == {(0, "")}
        run = tar.extractfile("sub/run")
        assert run is not None
        assert run.read() == b"x\n"
    assert (await ask(api, "archive", path="top", format="zip"))[0] == 400
    assert (await ask(api, "archive", path="missing"))[0] == 404
    assert (await ask(api, "archive", path="../.."))[0] == 403


async def test_archive_bounds(api: Api) -> None:
    await api.output("head -c 300000 /dev/urandom > noise; mkdir small; truncate -s 3G small/sparse")
    assert (await ask(api, "archive", max_bytes=200_000))[0] == 413
    # Packed it would be small enough.
    status, failure = await ask(api, "archive", path="small")
    assert (status, f"more than {MAX_UNPACKED_BYTES} bytes" in failure["error"]) == (413, True)
    assert (await ask(api, "archive", max_bytes=10**12))[0] == 400


async def test_archive_of_a_file_that_shrinks(api: Api) -> None:
    await api.output("head -c 3000000 /dev/urandom > file")
    writer = api.bash("while :; do : > file; head -c 3000000 /dev/zero > file; done", timeout=0.7)
    racing = asyncio.create_task(writer)
    while not racing.done():
        status, archive = await ask(api, "archive")
        assert status == 200
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive["content"]))) as tar:
            assert [member.name for member in tar] == ["file"]
    await racing
