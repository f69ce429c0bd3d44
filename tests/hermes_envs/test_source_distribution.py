"""Source distributions: fetched and unpacked with care."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from hermes_envs.errors import TaskBuildError
from hermes_envs.task_building.source_distribution import fetch
from tests.support.coin_purse import SOURCES, make_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive") / "coin_purse-1.0.tar.gz", SOURCES)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*")}


async def test_fetch(archive: Path, tmp_path: Path) -> None:
    source = await fetch(str(archive), tmp_path)
    assert (source.name, source.version, source.requirements) == ("coin-purse", "1.0", ())
    assert not list(source.tree.rglob("*.pyc"))


async def test_links_are_left_out(tmp_path: Path) -> None:
    link = tarfile.TarInfo("coin_purse-1.0/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    source = await fetch(str(make_archive(tmp_path / "a.tar.gz", SOURCES, [link])), tmp_path)
    assert not (source.tree / "link").is_symlink()


@pytest.mark.parametrize("name", ["../outside", "coin_purse-1.0/../../outside"])
async def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", SOURCES, [tarfile.TarInfo(name)])
    with pytest.raises(TaskBuildError, match="outside"):
        await fetch(str(archive), tmp_path / "scratch")
    assert "outside" not in names_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.tar.gz", "could not be opened"),
        ("broken.zip", "not a zip file"),
        ("no package", "neither a file nor a requirement"),
    ],
)
async def test_nothing_to_unpack(tmp_path: Path, name: str, message: str) -> None:
    package = tmp_path / name
    if package.suffix:
        package.write_bytes(b"garbage")
    with pytest.raises(TaskBuildError, match=message) as caught:
        await fetch(str(package), tmp_path / "scratch")
    assert "\n" not in str(caught.value)
