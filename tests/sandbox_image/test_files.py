"""The `read_file` and `write_file` tools, and what a slot may do to the files that they meet."""

from __future__ import annotations

import asyncio
import base64
import os
from typing import Any

import pytest

from sandbox_image.protocol import MAX_FILE_BYTES
from tests.sandbox_image.running import Api, RunningServer, launch, on_small_disk, open_directory, server_command

pytestmark = pytest.mark.any_user


async def read(api: Api, path: str, **args: Any) -> dict[str, Any]:
    return await api.tool("read_file", {"path": path, **args})


async def write(api: Api, path: str, content: str, **args: Any) -> dict[str, Any]:
    return await api.tool("write_file", {"path": path, "content": content, **args})


async def test_write_and_read(api: Api) -> None:
    result = await write(api, "src/deep/ä.txt", "zwölf\n")
    assert result["success"], result
    assert result["metadata"] == {"size": 7}
    for path in ("src/deep/ä.txt", "/workspace/src/deep/ä.txt", "./src/../src/deep/ä.txt"):
        found = await read(api, path)
        assert (found["output"], found["metadata"]["size"], found["metadata"]["truncated"]) == ("zwölf\n", 7, False)
    assert await api.output("cat src/deep/ä.txt; echo more >> src/deep/ä.txt; rm -r src") == "zwölf\n"


@pytest.mark.both_users
async def test_files_belong_to_the_slot(api: Api) -> None:
    await write(api, "a/b/script", "#!/bin/sh\necho ran\n", executable=True)
    await write(api, "plain", "x")
    assert await api.output("./a/b/script") == "ran\n"
    owners = await api.output("stat -c '%U %a' a a/b a/b/script plain")
    assert owners == "user 755\nuser 755\nuser 755\nuser 644\n"


@pytest.mark.both_users
async def test_replacing_keeps_the_mode_and_links(api: Api) -> None:
    await api.output("echo old > file; chmod 750 file; ln -s file link; mkdir d; ln -s /workspace/d/new absolute")
    assert (await write(api, "link", "new"))["success"]
    assert (await write(api, "absolute", "there"))["success"]
    assert await api.output("stat -c '%a %F' file link; cat file d/new") == "750 regular file\n777 symbolic link\nnewthere"
    await write(api, "file", "x", executable=False)
    assert await api.output("stat -c %a file; ls -A | wc -l") == "640\n4\n"


async def test_binary(api: Api) -> None:
    content = bytes(range(256))
    encoded = base64.b64encode(content).decode()
    assert (await write(api, "binary", encoded, encoding="base64"))["success"]
    assert (await read(api, "binary", encoding="base64"))["output"] == encoded
    result = await read(api, "binary")
    assert (result["success"], result["error"]) == (False, "binary: not UTF-8 text (byte 128); ask for encoding base64")
    assert "not base64" in (await write(api, "binary", "?", encoding="base64"))["error"]
    assert "surrogate" in (await write(api, "binary", "\ud800"))["error"]


async def test_long_files_are_cut(api: Api) -> None:
    await api.output("printf 'ää%0999d' 0 > file; truncate -s 3G sparse")
    result = await read(api, "file", max_bytes=3)
    assert (result["output"], result["metadata"]["truncated"], result["metadata"]["size"]) == ("ä", True, 1003)
    # Whoever read 3 GiB of it would need more than the memory that the server has for all.
    result = await read(api, "sparse", encoding="base64")
    assert result["metadata"] == {"size": 3 * 2**30, "truncated": True, "encoding": "base64"}
    assert len(result["output"]) == 4 * -(-MAX_FILE_BYTES // 3)


UNREADABLE = [
    ("missing", "No such file or directory"),
    ("directory", "Is a directory"),
    (".", "Is a directory"),
    ("", "Is a directory"),
    ("file/below", "Not a directory"),
    ("../slot_1/passwd", "outside of the workspace"),
    ("/etc/passwd", "outside of the workspace"),
    ("/workspace/../etc/passwd", "outside of the workspace"),
    ("/", "outside of the workspace"),
    ("to_etc", "outside of the workspace"),
    ("to_above", "outside of the workspace"),
    ("to_directory/../to_etc", "outside of the workspace"),
    ("to_etc_directory/passwd", "outside of the workspace"),
    ("circle", "Too many levels of symbolic links"),
    ("fifo", "not a regular file"),
    ("socket", ""),
    ("a\0b", "NUL"),
    ("x" * 300, "File name too long"),
    ("x/" * 3000, "longer than 4096"),
    ("./" * 2000 + "a/" * 10, "No such file"),
    ("\ud800", "surrogate"),
]


@pytest.mark.both_users
async def test_what_cannot_be_read(api: Api) -> None:
    await api.output(
        "mkdir directory; echo x > file; ln -s /etc/passwd to_etc; ln -s ../../passwd to_above; ln -s directory to_directory;"
        "ln -s /etc to_etc_directory; ln -s circle circle; mkfifo fifo;"
        "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('socket')\""
    )
    for path, reason in UNREADABLE:
        result = await read(api, path)
        assert not result["success"], path
        assert reason in result["error"], path
        assert result["error"].count("\n") == 0, path


@pytest.mark.both_users
async def test_what_cannot_be_written(api: Api, server: RunningServer) -> None:
    await api.output(
        "mkdir directory; echo x > file; ln -s /etc to_etc_directory; ln -s circle circle; mkfifo fifo; mkdir -m 0 closed"
    )
    paths = ["directory", "to_etc_directory/new", "fifo", "/etc/new", "../new", "file/below", "circle"]
    if os.stat(f"/proc/{server.process.pid}").st_uid != 0:
        paths.append("closed/x")
    for path in paths:
        result = await write(api, path, "content")
        assert not result["success"], path
        assert path.split("/", maxsplit=1)[0] in result["error"], path
    assert "new" not in os.listdir("/etc")
    assert await api.output("chmod 700 closed; ls -A . closed | grep tmp | wc -l") == "0\n"


async def test_links_within_the_workspace_work(api: Api) -> None:
    await api.output(
        "mkdir -p a/b; echo x > a/b/file; ln -s a/b short; ln -s ../a/./b a/again; ln -s /workspace/short/file abs"
    )
    for path in ("short/file", "a/again/file", "abs", "a/again/../b/file"):
        assert (await read(api, path))["output"] == "x\n"


async def test_a_name_that_keeps_changing_leads_nowhere(api: Api) -> None:
    await api.output("mkdir real; echo inside > real/passwd")
    loop = "os.symlink('/etc', 'l'); os.rename('l', 'd'); os.unlink('d'); os.rename('real', 'd'); os.rename('d', 'real')"
    swap = f"import os\nwhile True:\n  {loop}"
    racing = asyncio.create_task(api.bash(f'python3 -c "{swap}"', timeout=0.8))
    other = Api(api.session)
    found = set()
    while not racing.done():
        # Artifact requests do not wait for the running command.
        _, answer = await other.post("/artifacts/read", {"slot_id": "slot_0", "path": "d/passwd"})
        found.add(answer.get("content", answer.get("kind")))
    await racing
    assert found <= {"inside\n", "not_found", "outside_workspace"}
    assert len(found) > 1


async def test_a_full_disk_is_an_error_that_loses_nothing() -> None:
    with open_directory() as directory:
        command = [*on_small_disk(directory, 8), *server_command(directory, "--workspaces-on-disk", slots=1)]
        server = launch(command, directory)
        api = Api.over(server)
        async with api.session:
            await write(api, "file", "precious")
            result = await write(api, "file", "x" * 20_000_000)
            assert (result["success"], result["error"]) == (False, "file: No space left on device")
            assert "No space left" in (await api.bash("yes > big"))["output"]
            assert (await write(api, "other", "y" * 10_000))["error"] == "other: No space left on device"
            assert await api.output("cat file; rm big; ls -A") == "preciousfile\n"
            assert (await write(api, "other", "y" * 10_000))["success"]
        assert server.stop() == 0
        assert server.process.stdout is not None
        server.process.stdout.close()
