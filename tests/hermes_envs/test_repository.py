from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hermes_envs.errors import EnvironmentBuildError
from hermes_envs.repositories.repository import RepositoryCache
from tests.support.small_task import git, write_task_folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two commits; the second changes a file."""
    work = write_task_folder(tmp_path / "tasks") / "work"
    (work / "calc/core.py").write_text("# the answer was here\n")
    git(work, "commit", "--quiet", "--all", "-m", "second")
    git(work, "push", "--quiet", "../repositories/small/calc.git", "main:other")
    return work


def cache_of(tmp_path: Path, url: str | None = None) -> RepositoryCache:
    return RepositoryCache(tmp_path / "cache", url or (tmp_path / "tasks/repositories").as_uri(), timeout_s=30)


def unpack(bundle: bytes, directory: Path) -> Path:
    directory.mkdir()
    (directory / "bundle").write_bytes(bundle)
    git(directory, "clone", "--quiet", "bundle", "clone")
    return directory / "clone"


async def test_a_snapshot_is_one_commit_without_history(repository: Path, tmp_path: Path) -> None:
    snapshot = await cache_of(tmp_path).snapshot("small/calc", git(repository, "rev-parse", "HEAD"))
    clone = unpack(snapshot.bundle, tmp_path / "out")
    assert (clone / "calc/core.py").read_text() == "# the answer was here\n"
    assert git(clone, "rev-list", "--all", "--count") == "1"
    assert git(clone, "rev-parse", "HEAD") == snapshot.commit


async def test_a_branch_and_the_commit_before_it(repository: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    tip = await cache.snapshot("small/calc", "other")
    before = await cache.snapshot("small/calc", "other", generation=1)
    assert "answer" in (unpack(tip.bundle, tmp_path / "tip") / "calc/core.py").read_text()
    assert "def mean" in (unpack(before.bundle, tmp_path / "before") / "calc/core.py").read_text()


async def test_snapshots_are_the_same_everywhere_and_made_once(repository: Path, tmp_path: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    cache = cache_of(tmp_path)
    first, second = await asyncio.gather(cache.snapshot("small/calc", head), cache.snapshot("small/calc", head))
    assert first == second
    (tmp_path / "tasks").rename(tmp_path / "gone")
    assert (await cache.snapshot("small/calc", head)) == first


@pytest.mark.parametrize(("name", "revision"), [("small/none", "main"), ("small/calc", "0" * 40), ("small/calc", "nowhere")])
async def test_what_cannot_be_fetched_is_an_error_of_the_task(
    repository: Path, tmp_path: Path, name: str, revision: str
) -> None:
    with pytest.raises(EnvironmentBuildError, match=r"git fetch failed|git rev-parse failed"):
        await cache_of(tmp_path).snapshot(name, revision)
    assert not list((tmp_path / "cache").iterdir())
