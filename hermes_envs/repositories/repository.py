"""Repositories at one commit, without their history."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hermes_envs.errors import EnvironmentBuildError
from hermes_envs.repositories.git import BRANCH, run_git


@dataclass(frozen=True)
class RepositorySnapshot:
    """A tree as the only commit of a repository, packed as a git bundle.

    `commit` is what a patch is taken against; it is kept on the host, where no agent can change it.
    """

    bundle: bytes
    commit: str


class RepositoryCache:
    """Fetches commits and packs each as a repository of one commit: history holds the answer.

    Bundles are cached by repository and commit below `directory`; `base_url` is a prefix such as `https://host` or
    `file:///folder` under which `OWNER/NAME.git` is found.
    """

    def __init__(self, directory: Path, base_url: str, timeout_s: float) -> None:
        self._directory = directory.absolute()
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._locks: dict[Path, asyncio.Lock] = {}

    async def snapshot(self, repository: str, revision: str, *, generation: int = 0) -> RepositorySnapshot:
        """The repository at a commit or at the tip of a branch, or `generation` commits before that.

        Raises:
            EnvironmentBuildError: it cannot be fetched.
        """
        url = f"{self._base_url}/{repository}.git"
        key = hashlib.sha256(f"{url}\0{revision}\0{generation}".encode()).hexdigest()[:32]
        folder = self._directory / key
        async with self._locks.setdefault(folder, asyncio.Lock()):
            return await asyncio.to_thread(self._load_or_fetch, folder, url, revision, generation)

    def _load_or_fetch(self, folder: Path, url: str, revision: str, generation: int) -> RepositorySnapshot:
        if not folder.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".fetch-") as scratch:
                self._fetch(Path(scratch), url, revision, generation)
                # Another process may have been faster; its bundle is as good.
                if not folder.exists():
                    (Path(scratch) / "snapshot").rename(folder)
        return RepositorySnapshot((folder / "bundle").read_bytes(), (folder / "commit").read_text().strip())

    def _fetch(self, scratch: Path, url: str, revision: str, generation: int) -> None:
        # Folders of other users are only read here, and nothing in them is run.
        configuration = scratch / ".gitconfig"
        configuration.write_text("[safe]\n\tdirectory = *\n")
        environment = {"HOME": str(scratch), "GIT_CONFIG_GLOBAL": str(configuration)}

        def git(*arguments: str) -> str:
            output = run_git(repository, *arguments, error=EnvironmentBuildError, timeout_s=self._timeout_s, env=environment)
            return output.decode(errors="replace").strip()

        repository = scratch / "repository.git"
        repository.mkdir()
        git("init", "--quiet", "--bare")
        try:
            git("fetch", "--quiet", f"--depth={generation + 1}", "--no-tags", url, revision)
        except EnvironmentBuildError:
            # Servers may refuse to hand out a commit that no branch points to; everything has it.
            git("fetch", "--quiet", "--no-tags", url, "+refs/*:refs/fetched/*")
            git("rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}")
            git("update-ref", "FETCH_HEAD", f"{revision}^{{commit}}")
        commit = git("commit-tree", f"FETCH_HEAD~{generation}^{{tree}}", "-m", "Start of the task")
        git("update-ref", f"refs/heads/{BRANCH}", commit)
        git("symbolic-ref", "HEAD", f"refs/heads/{BRANCH}")
        snapshot = scratch / "snapshot"
        snapshot.mkdir()
        git("bundle", "create", "--quiet", str(snapshot / "bundle"), "HEAD", f"refs/heads/{BRANCH}")
        (snapshot / "commit").write_text(commit)
