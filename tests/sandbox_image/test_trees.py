"""Removing trees that were made to be hard to remove, and keeping the ends of a stream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_image.storage.trees import TreeCopyError, copy_tree, remove_tree
from sandbox_image.tools.shell import OutputBuffer
from tests.sandbox_image.running import as_other_user, environment, open_directory

HARD = """
import os, sys
os.chdir(sys.argv[1])
os.mkdir("tree"); os.chdir("tree")
os.symlink("/etc", "link"); os.symlink("nowhere", "dangling"); os.mkfifo("fifo")
for n in range(30):
    os.mkdir(f"wide{n}"); open(f"wide{n}/file", "w").close()
os.makedirs("closed/inner/deeper"); open("closed/inner/file", "w").close()
for path, mode in (("closed/inner/deeper", 0), ("closed/inner", 0), ("closed", 0), ("wide0", 0o500), ("wide1", 0o200)):
    os.chmod(path, mode)
for n in range(2500):
    os.mkdir("d"); open("f", "w").close(); os.chdir("d")
os.chmod(".", 0)
"""


@pytest.mark.parametrize("other_user", [False, True], ids=["own user", "ordinary user"])
def test_hard_trees_are_removed(other_user: bool) -> None:
    with open_directory(other_user=other_user, memory=True) as directory:
        prefix = as_other_user(directory) if other_user else [sys.executable]
        source = (
            f"{HARD}\nos.chdir('/')\nfrom sandbox_image.storage.trees import remove_tree\nremove_tree(sys.argv[1] + '/tree')"
        )
        subprocess.run([*prefix, "-c", source, str(directory)], env=environment(), check=True)
        assert not (directory / "tree").exists()
        assert os.path.exists("/etc/passwd")


def test_roots_remove_what_slots_have_made() -> None:
    with open_directory(other_user=os.geteuid() == 0, memory=True) as directory:
        prefix = as_other_user(directory)
        subprocess.run([*prefix, "-c", HARD, str(directory)], env=environment(), check=True)
        remove_tree(directory / "tree")
        assert not (directory / "tree").exists()


def test_what_is_not_a_tree(tmp_path: Path) -> None:
    remove_tree(tmp_path / "missing")
    remove_tree(tmp_path / "missing" / "below")
    (tmp_path / "file").touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    (tmp_path / "link").symlink_to("target")
    remove_tree(tmp_path / "file")
    remove_tree(str(tmp_path / "link"))
    assert sorted(os.listdir(tmp_path)) == ["target"]
    assert os.listdir(tmp_path / "target") == ["kept"]


async def test_a_copy_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(TreeCopyError, match="No such file"):
        await copy_tree(str(tmp_path / "missing"), str(tmp_path / "copy"), None)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_both_ends_of_a_stream_are_kept(chunk: int) -> None:
    stream = b"".join(b"%05d\n" % n for n in range(2000))
    buffer = OutputBuffer(100)
    for start in range(0, len(stream), chunk):
        buffer.write(stream[start : start + chunk])
    assert buffer.truncated
    assert buffer.total == len(stream)
    head, tail = buffer.text().split("\n[... 11900 bytes dropped ...]\n")
    assert (head.encode(), tail.encode()) == (stream[:50], stream[-50:])


def test_a_short_stream_is_kept_whole() -> None:
    for size in range(12):
        buffer = OutputBuffer(11)
        buffer.write(b"x" * size)
        assert (buffer.text(), buffer.truncated) == ("x" * size, False)
