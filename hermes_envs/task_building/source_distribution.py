"""Source distributions of packages: fetched with pip, unpacked with care."""

from __future__ import annotations

import asyncio
import email
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from hermes_envs.errors import TaskBuildError
from hermes_envs.task_building.python_process import run_module

_PIP_TIMEOUT_S = 300.0
_MAX_UNPACKED_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class SourceDistribution:
    """An unpacked source distribution; `requirements` are those that it needs to run, without extras."""

    name: str
    version: str
    tree: Path
    requirements: tuple[str, ...]


async def fetch(package: str, scratch: Path) -> SourceDistribution:
    """Get and unpack a package, which is a requirement such as `funcy==2.1` or the path of an archive.

    Raises:
        TaskBuildError: pip cannot get it, or the archive is malformed; the message is one line.
    """
    archive = Path(package)
    if not await asyncio.to_thread(archive.is_file):
        archive = await _download(package, scratch / "download")
    return await asyncio.to_thread(_unpack, archive, scratch / "unpacked")


async def build_wheels(requirements: Sequence[str], folder: Path) -> None:
    """Put wheels of the requirements, and of what they need, into a folder.

    Raises:
        TaskBuildError: pip cannot get or build one.
    """
    await _run_pip("wheel", "--wheel-dir", str(folder), *requirements)


async def _run_pip(command: str, *arguments: str) -> None:
    """Run pip with the user's own configuration.

    Raises:
        TaskBuildError: it fails; the message is the last error that it wrote.
    """
    quietly = ("--quiet", "--disable-pip-version-check", "--no-input")
    exit_code, lines = await run_module("pip", command, *quietly, *arguments, timeout_s=_PIP_TIMEOUT_S)
    if exit_code != 0:
        errors = [line for line in lines if line.lower().startswith("error")]
        reason = (errors or lines or [f"status {exit_code}"])[-1]
        raise TaskBuildError(f"pip {command} failed: {reason[:500]}")


async def _download(requirement: str, folder: Path) -> Path:
    try:
        Requirement(requirement)
    except InvalidRequirement as reason:
        message = str(reason).splitlines()[0]
        raise TaskBuildError(f"{requirement!r} is neither a file nor a requirement: {message}") from reason
    command = ("download", "--no-binary", ":all:", "--no-deps", "--dest", str(folder))
    try:
        # Most packages say who they are without anything being built.
        await _run_pip(*command, "--no-build-isolation", requirement)
    except TaskBuildError:
        await _run_pip(*command, requirement)
    archives = await asyncio.to_thread(lambda: sorted(folder.iterdir()))
    if len(archives) != 1:
        raise TaskBuildError(f"{requirement}: pip left {len(archives)} archives")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> SourceDistribution:
    """Unpack regular files alone: no links, no devices, nothing outside of the folder, nothing compiled."""
    folder.mkdir(parents=True)
    try:
        if archive.suffix == ".zip":
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as reason:
        message = (str(reason).splitlines() or [type(reason).__name__])[0].rstrip(":")
        raise TaskBuildError(f"{archive.name}: {message}") from reason
    trees = [path for path in folder.iterdir() if path.is_dir()]
    if len(trees) != 1:
        raise TaskBuildError(f"{archive.name}: expected one folder, found {len(trees)}")
    return _describe(trees[0])


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and not _is_compiled(member.name)]
        _check_size(archive, sum(member.size for member in members))
        for member in members:
            # Python learned to refuse dangerous names itself in 3.11.4 only.
            target = _inside(folder, member.name)
            content = tar.extractfile(member)
            assert content is not None, "these are regular files"
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(content, file)
            target.chmod(0o755 if member.mode & 0o100 else 0o644)


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = [member for member in file.infolist() if not member.is_dir() and not _is_compiled(member.filename)]
        _check_size(archive, sum(member.file_size for member in members))
        for member in members:
            _inside(folder, member.filename)
            file.extract(member, folder)


def _inside(folder: Path, name: str) -> Path:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise TaskBuildError(f"{name!r} leads outside of the archive")
    return target


def _check_size(archive: Path, size: int) -> None:
    if size > _MAX_UNPACKED_BYTES:
        raise TaskBuildError(f"{archive.name} unpacks to {size} bytes, more than {_MAX_UNPACKED_BYTES}")


def _is_compiled(name: str) -> bool:
    return name.endswith((".pyc", ".pyo")) or "__pycache__" in name.split("/")


def _describe(tree: Path) -> SourceDistribution:
    try:
        metadata = email.message_from_string((tree / "PKG-INFO").read_text(encoding="utf-8", errors="replace"))
    except OSError as reason:
        raise TaskBuildError(f"{tree.name}: no PKG-INFO: not a source distribution") from reason
    name, version = metadata["Name"], metadata["Version"]
    if not name or not version:
        raise TaskBuildError(f"{tree.name}: PKG-INFO lacks Name or Version")
    requirements = []
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            requirements.append(str(requirement))
    return SourceDistribution(canonicalize_name(name), version, tree, tuple(requirements))
