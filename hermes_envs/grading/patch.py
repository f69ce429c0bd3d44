"""Takes an agent's change out of its slot, and puts it into a clean one."""

from __future__ import annotations

import secrets
import shlex
from dataclasses import dataclass

from backends.errors import ArtifactError
from hermes_envs.grading.protection import Change, Protection
from hermes_envs.repositories.python_environment import REPOSITORY, clone_command
from hermes_envs.repositories.repository import RepositorySnapshot
from hermes_envs.workspace import Workspace, explain
from sandbox_image.protocol import WORKSPACE

MAX_PATCH_BYTES = 32 * 1024 * 1024
_TIMEOUT_S = 120.0
# Agents own the repository's configuration and attributes: none of it may run anything or change what a diff says.
_GIT = "git -c core.fsmonitor=false -c core.hooksPath=/dev/null -c core.quotePath=false -c core.autocrlf=false -c gc.auto=0"
_DIFF = "diff --cached --no-renames --no-ext-diff --no-textconv --no-color"


class PatchError(Exception):
    """The agent's change cannot be taken or applied: its own doing, worth no reward."""


@dataclass(frozen=True)
class AppliedPatch:
    """What became of a patch: the paths that count, and those left out with the reason for each."""

    changed: tuple[str, ...]
    left_out: dict[str, str]


async def capture_patch(workspace: Workspace, snapshot: RepositorySnapshot) -> bytes:
    """The difference between the snapshot and the agent's tree, as a binary git diff; empty if there is none.

    The agent's own `.git` takes no part: the tree is compared with a repository made anew from the host's copy.

    Raises:
        PatchError: the tree cannot be read, or the patch is larger than `MAX_PATCH_BYTES`.
        SandboxError: the slot failed.
    """
    scratch = f"{WORKSPACE}/.capture-{secrets.token_hex(8)}"
    written = await workspace.write(f"{scratch}/bundle", snapshot.bundle)
    if not written.success:
        raise PatchError(f"no room to compare the tree: {explain(written)}")
    git = f"{_GIT} --git-dir={scratch}/repository --work-tree={REPOSITORY}"
    command = " && ".join(
        (
            clone_command(f"{scratch}/bundle", f"{scratch}/repository", "--bare"),
            # From the commit's index on: files that are tracked although .gitignore names them stay what they are.
            f"{git} read-tree {snapshot.commit}",
            f"{git} add --all",
            f"{git} {_DIFF} --binary --full-index {snapshot.commit} > {scratch}/patch",
        )
    )
    result = await workspace.run(command, cwd=REPOSITORY, env=_clean_home(scratch), timeout_s=_TIMEOUT_S)
    if not result.success:
        raise PatchError(f"the tree cannot be compared: {explain(result)}")
    try:
        return await workspace.read(f"{scratch}/patch", max_bytes=MAX_PATCH_BYTES)
    except ArtifactError as reason:
        raise PatchError(f"the patch cannot be read: {reason}") from reason


async def apply_patch(workspace: Workspace, patch: bytes, protection: Protection) -> AppliedPatch:
    """Apply a patch to the pristine repository of a clean slot, and undo what it does to protected paths.

    Nothing of the agent's runs here: git applies data, then the tree is compared with the pristine commit.

    Raises:
        PatchError: the patch does not apply.
        SandboxError: the slot failed.
    """
    scratch = f"{WORKSPACE}/.apply-{secrets.token_hex(8)}"
    await _must_write(workspace, f"{scratch}/patch", patch)
    result = await workspace.run(
        # Copying a layer changes what the index remembers of each file; nothing else has changed them.
        f"{_GIT} update-index -q --refresh && {_GIT} apply --index --binary --whitespace=nowarn {scratch}/patch"
        f" && {_GIT} {_DIFF} --raw -z HEAD > {scratch}/changes",
        cwd=REPOSITORY,
        env=_clean_home(scratch),
        timeout_s=_TIMEOUT_S,
    )
    if not result.success:
        raise PatchError(f"the patch does not apply: {explain(result)}")
    changes = _parse_raw(await workspace.read(f"{scratch}/changes"))
    left_out = {change.path: reason for change in changes if (reason := protection.reason(change)) is not None}
    await _undo(workspace, scratch, [change for change in changes if change.path in left_out])
    return AppliedPatch(tuple(change.path for change in changes if change.path not in left_out), left_out)


async def list_files(workspace: Workspace) -> list[str]:
    """The files of the pristine repository of a clean slot."""
    result = await workspace.run(f"{_GIT} ls-tree -r -z --name-only HEAD > {WORKSPACE}/.files", cwd=REPOSITORY)
    if not result.success:
        raise PatchError(f"the repository cannot be listed: {explain(result)}")
    return (await workspace.read(f"{WORKSPACE}/.files")).decode("utf-8", "surrogateescape").split("\0")[:-1]


async def _undo(workspace: Workspace, scratch: str, changes: list[Change]) -> None:
    added = [change.path for change in changes if change.is_new]
    restored = [change.path for change in changes if not change.is_new]
    # First what stands where a folder has to come back.
    for name, paths, command in (
        ("added", added, "rm --quiet --force"),
        ("restored", restored, "checkout --quiet HEAD"),
    ):
        if not paths:
            continue
        await _must_write(workspace, f"{scratch}/{name}", b"\0".join(path.encode("utf-8", "surrogateescape") for path in paths))
        result = await workspace.run(
            f"{_GIT} {command} --pathspec-from-file={shlex.quote(f'{scratch}/{name}')} --pathspec-file-nul",
            cwd=REPOSITORY,
            env={**_clean_home(scratch), "GIT_LITERAL_PATHSPECS": "1"},
            timeout_s=_TIMEOUT_S,
        )
        if not result.success:
            raise PatchError(f"protected paths cannot be restored: {explain(result)}")


async def _must_write(workspace: Workspace, path: str, content: bytes) -> None:
    written = await workspace.write(path, content)
    if not written.success:
        raise PatchError(f"the patch does not fit into the workspace: {explain(written)}")


def _clean_home(directory: str) -> dict[str, str]:
    return {"HOME": directory, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}


def _parse_raw(listing: bytes) -> list[Change]:
    """Parse `git diff --raw -z`: `:OLD_MODE NEW_MODE OLD NEW STATUS\\0PATH\\0` for each path."""
    fields = listing.decode("utf-8", "surrogateescape").split("\0")[:-1]
    changes = []
    for description, path in zip(fields[::2], fields[1::2], strict=True):
        old_mode, new_mode = description.lstrip(":").split(" ")[:2]
        changes.append(Change(path, old_mode, new_mode))
    return changes
