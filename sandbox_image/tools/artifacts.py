"""The artifact routes: read a file of a workspace, list a directory, pack a directory.

All of these functions block: run them in a thread.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sandbox_image import pieces
from sandbox_image.errors import OutsideWorkspaceError, RequestError, ToolError
from sandbox_image.protocol import (
    ArtifactArchive,
    ArtifactArchiveRequest,
    ArtifactContent,
    ArtifactListing,
    ArtifactListRequest,
    ArtifactReadRequest,
    ErrorKind,
)
from sandbox_image.storage.workspace_files import DIRECTORY_FLAGS, WorkspaceFiles
from sandbox_image.tools.files import read_up_to

MAX_DEPTH = 128
"""How deep a listing or an archive goes; each directory on the way is held open."""
MAX_UNPACKED_BYTES = 1024**3
"""The largest unpacked size of an archive, against decompression bombs."""


def read(files: WorkspaceFiles, request: ArtifactReadRequest) -> ArtifactContent:
    """One regular file, whole.

    Raises:
        RequestError: not found, outside of the workspace, not a regular file, too large, not text.
    """
    with _as_request_errors(request.path), files.file(request.path) as (descriptor, found):
        if found.st_size > request.max_bytes:
            raise RequestError(ErrorKind.TOO_LARGE, f"{request.path}: {found.st_size} bytes, the limit is {request.max_bytes}")
        content = read_up_to(descriptor, request.max_bytes + 1)
    return contain(request, content)


def contain(request: ArtifactReadRequest, content: bytes) -> ArtifactContent:
    """The answer with this content.

    Raises:
        RequestError: too large, not text.
    """
    if len(content) > request.max_bytes:
        raise RequestError(ErrorKind.TOO_LARGE, f"{request.path}: more than the limit of {request.max_bytes} bytes")
    if request.encoding == "base64":
        text = pieces.encode_base64(content)
    else:
        try:
            text = pieces.decode_text(content)
        except UnicodeDecodeError as error:
            message = f"{request.path}: not UTF-8 text (byte {error.start}); ask for encoding base64"
            raise RequestError(ErrorKind.BAD_REQUEST, message) from error
    digest = hashlib.sha256(content).hexdigest() if request.include_sha256 else None
    return ArtifactContent(text, request.encoding, len(content), digest)


def listing(files: WorkspaceFiles, request: ArtifactListRequest) -> ArtifactListing:
    """The entries of a directory, or of all directories below it.

    Raises:
        RequestError: not found, not a directory, outside of the workspace.
    """
    entries: list[dict[str, Any]] = []
    truncated = False
    with _as_request_errors(request.path), files.directory(request.path) as top:
        walk = _Walk(top, request.max_entries + 1, MAX_DEPTH if request.recursive else 1)
        for entry in walk.entries():
            if len(entries) == request.max_entries:
                truncated = True
                break
            entries.append(
                {
                    "path": entry.path,
                    "type": _kind(entry.status),
                    "size": entry.status.st_size,
                    "mode": stat.S_IMODE(entry.status.st_mode),
                }
            )
    entries = pieces.smallest(entries, len(entries), key=lambda entry: str(entry["path"]))
    return ArtifactListing(entries, truncated or (request.recursive and walk.too_deep))


def archive(files: WorkspaceFiles, request: ArtifactArchiveRequest) -> ArtifactArchive:
    """A directory as a compressed tar archive, without devices, sockets and FIFOs.

    Raises:
        RequestError: not found, not a directory, outside of the workspace, more bytes or entries than asked for.
    """
    packed = _Bounded(request.path, request.max_bytes)
    count = 0
    unpacked = 0
    with _as_request_errors(request.path), files.directory(request.path) as top:
        walk = _Walk(top, request.max_entries + 1, MAX_DEPTH)
        with tarfile.open(fileobj=packed, mode="w:gz", format=tarfile.PAX_FORMAT, compresslevel=6) as tar:
            for entry in walk.entries():
                if _kind(entry.status) == "other":
                    continue
                count += 1
                if count > request.max_entries:
                    raise RequestError(ErrorKind.TOO_LARGE, f"{request.path}: more than {request.max_entries} entries")
                unpacked += entry.status.st_size if stat.S_ISREG(entry.status.st_mode) else 0
                if unpacked > MAX_UNPACKED_BYTES:
                    raise RequestError(ErrorKind.TOO_LARGE, f"{request.path}: more than {MAX_UNPACKED_BYTES} bytes")
                _pack(tar, entry)
        if walk.too_deep:
            raise RequestError(ErrorKind.TOO_LARGE, f"{request.path}: more than {MAX_DEPTH} directories inside of each other")
    content = packed.getvalue()
    return ArtifactArchive(pieces.encode_base64(content), len(content), count)


@dataclass(frozen=True)
class _Entry:
    path: str
    name: str
    directory: int
    status: os.stat_result


class _Walk:
    """Visits a tree in the order of names, through open directories, without following links."""

    def __init__(self, top: int, limit: int, depth: int) -> None:
        self._top = top
        self._limit = limit
        self._depth = depth
        self.too_deep = False

    def entries(self) -> Iterator[_Entry]:
        """Every entry, directories before their content. Entries that vanish meanwhile are left out."""
        yield from self._below(self._top, "", self._depth)

    def _below(self, directory: int, prefix: str, depth: int) -> Iterator[_Entry]:
        with os.scandir(directory) as found:
            # The memory is limited, however many entries the directory has.
            names = pieces.smallest((entry.name for entry in found), self._limit)
        for name in names:
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield _Entry(prefix + name, name, directory, status)
            if not stat.S_ISDIR(status.st_mode):
                continue
            if depth == 1:
                self.too_deep = True
                continue
            try:
                inner = os.open(name, DIRECTORY_FLAGS, dir_fd=directory)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            try:
                yield from self._below(inner, f"{prefix}{name}/", depth - 1)
            finally:
                os.close(inner)


class _Bounded(io.BytesIO):
    def __init__(self, path: str, limit: int) -> None:
        super().__init__()
        self._path = path
        self._limit = limit

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        if self.tell() + len(data) > self._limit:
            raise RequestError(ErrorKind.TOO_LARGE, f"{self._path}: the archive has more than {self._limit} bytes")
        return super().write(data)


class _Padded(io.RawIOBase):
    """A file that is padded to its announced size if it shrinks while it is read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int = -1, /) -> bytes:
        return read_up_to(self._descriptor, size).ljust(size, b"\0")


def _pack(tar: tarfile.TarFile, entry: _Entry) -> None:
    info = tarfile.TarInfo(entry.path)
    info.mode = stat.S_IMODE(entry.status.st_mode)
    info.mtime = int(entry.status.st_mtime)
    if stat.S_ISDIR(entry.status.st_mode):
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    elif stat.S_ISLNK(entry.status.st_mode):
        info.type = tarfile.SYMTYPE
        info.linkname = os.readlink(entry.name, dir_fd=entry.directory)
        tar.addfile(info)
    else:
        descriptor = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=entry.directory)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                info.size = entry.status.st_size
                tar.addfile(info, _Padded(descriptor))
        finally:
            os.close(descriptor)


def _kind(status: os.stat_result) -> str:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISDIR(status.st_mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(status.st_mode) else "other"


@contextmanager
def _as_request_errors(path: str) -> Iterator[None]:
    """Turn the errors of the file system about a path into request errors."""
    try:
        yield
    except OutsideWorkspaceError as error:
        raise RequestError(ErrorKind.OUTSIDE_WORKSPACE, str(error)) from error
    except ToolError as error:
        raise RequestError(ErrorKind.BAD_REQUEST, str(error)) from error
    except (IsADirectoryError, PermissionError) as error:
        raise RequestError(ErrorKind.OUTSIDE_WORKSPACE, f"{path}: {error.strerror}") from error
    except OSError as error:
        raise RequestError(ErrorKind.NOT_FOUND, f"{path}: {error.strerror}") from error
