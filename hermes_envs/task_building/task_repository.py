"""Buggy trees as git commits that know nothing of the trees they were made from."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hermes_envs.errors import TaskBuildError
from hermes_envs.repositories.git import BRANCH, run_git

_TIMEOUT_S = 120.0


class TaskRepository:
    """A bare git repository in which the trees of one project's tasks are made.

    It also holds the clean tree; `publish` makes the repository that may be handed out. Not for concurrent use.
    """

    def __init__(self, git_directory: Path) -> None:
        """Create the repository in a directory that does not exist yet."""
        self._git_directory = git_directory
        _init(git_directory)

    def add_tree(self, directory: Path) -> str:
        """Store a directory's files to the letter and return the tree's id. Links and compiled files are left out."""
        files = list(_source_files(directory))
        listing = "\n".join(str(path.absolute()) for path in files).encode()
        blobs = self._git("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=listing).decode().split()
        entries = {path.relative_to(directory).as_posix(): (_mode(path), blob) for path, blob in zip(files, blobs, strict=True)}
        return self._write_tree(None, entries)

    def edited_tree(self, tree: str, contents: Mapping[str, bytes]) -> str:
        """The tree with other contents in some of its regular files."""
        entries = {}
        for path, content in contents.items():
            mode = self._git("ls-tree", tree, "--", path).decode().split(" ", 1)[0]
            blob = self._git("hash-object", "-w", "--no-filters", "--stdin", stdin=content).decode().strip()
            entries[path] = (mode, blob)
        return self._write_tree(tree, entries)

    def patched_tree(self, tree: str, patch: bytes) -> str:
        """The tree with a git diff applied to it.

        Raises:
            TaskBuildError: it does not apply.
        """
        with self._index() as index:
            self._git("read-tree", tree, index=index)
            self._git("apply", "--cached", "--whitespace=nowarn", "-", stdin=patch, index=index)
            return self._git("write-tree", index=index).decode().strip()

    def add_task(self, instance_id: str, tree: str) -> str:
        """Make a tree the only commit of a branch that is named after the task; returns the commit's id."""
        commit = self._git("commit-tree", tree, "-m", "Start of the task").decode().strip()
        self._git("update-ref", f"refs/heads/{instance_id}", commit)
        return commit

    def diff(self, old: str, new: str) -> str:
        """What turns one tree into the other, as a git diff.

        Raises:
            TaskBuildError: the difference is not UTF-8 text.
        """
        patch = self._git("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", old, new)
        try:
            return patch.decode()
        except UnicodeDecodeError as reason:
            raise TaskBuildError(f"the patch is not UTF-8: {reason}") from reason

    def changed_files(self, old: str, new: str) -> dict[str, bytes]:
        """The contents in the new tree of the files that differ from the old one."""
        paths = self._git("diff", "--name-only", "--no-renames", "-z", old, new).decode().split("\0")[:-1]
        return {path: self._git("cat-file", "blob", f"{new}:{path}") for path in paths}

    def publish(self, git_directory: Path) -> None:
        """Create a bare repository that has the tasks' commits and nothing else."""
        git_directory.parent.mkdir(parents=True, exist_ok=True)
        _init(git_directory)
        source = str(self._git_directory.absolute())
        _git(git_directory, "fetch", "--quiet", "--no-tags", source, "+refs/heads/*:refs/heads/*")
        (git_directory / "FETCH_HEAD").unlink(missing_ok=True)

    def _write_tree(self, base: str | None, entries: Mapping[str, tuple[str, str]]) -> str:
        listing = b"".join(f"{mode} {blob}\t{path}\0".encode() for path, (mode, blob) in sorted(entries.items()))
        with self._index() as index:
            if base is not None:
                self._git("read-tree", base, index=index)
            self._git("update-index", "-z", "--index-info", stdin=listing, index=index)
            return self._git("write-tree", index=index).decode().strip()

    @contextmanager
    def _index(self) -> Iterator[Path]:
        """The name of an index file that is there for the length of a block."""
        with tempfile.TemporaryDirectory(dir=self._git_directory, prefix="index-") as directory:
            yield Path(directory) / "index"

    def _git(self, *arguments: str, stdin: bytes = b"", index: Path | None = None) -> bytes:
        return _git(self._git_directory, *arguments, stdin=stdin, index=index)


def keep_tasks(git_directory: Path, instance_ids: Collection[str]) -> None:
    """Take all other tasks out of a repository that was published."""
    branches = _git(git_directory, "for-each-ref", "--format=%(refname)", "refs/heads").decode().split()
    dropped = [branch for branch in branches if branch.removeprefix("refs/heads/") not in instance_ids]
    if dropped:
        _git(git_directory, "update-ref", "--stdin", stdin="".join(f"delete {branch}\n" for branch in dropped).encode())
        _git(git_directory, "gc", "--quiet", "--prune=now")


def _source_files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        compiled = path.suffix in (".pyc", ".pyo") or "__pycache__" in path.parts
        if path.is_file() and not path.is_symlink() and not compiled and "\n" not in path.name:
            yield path


def _mode(path: Path) -> str:
    return "100755" if path.stat().st_mode & stat.S_IXUSR else "100644"


def _init(git_directory: Path) -> None:
    git_directory.mkdir(parents=True)
    # Without a template: hooks and descriptions would differ from machine to machine.
    _git(git_directory, "init", "--quiet", "--bare", "--template=", f"--initial-branch={BRANCH}")


def _git(git_directory: Path, *arguments: str, stdin: bytes = b"", index: Path | None = None) -> bytes:
    env = {} if index is None else {"GIT_INDEX_FILE": str(index.absolute())}
    return run_git(git_directory, *arguments, error=TaskBuildError, timeout_s=_TIMEOUT_S, stdin=stdin, env=env)
