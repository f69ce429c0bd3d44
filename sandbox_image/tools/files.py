"""The `read_file` and `write_file` tools."""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import stat
from dataclasses import dataclass
from typing import Annotated, Literal

from sandbox_image import pieces
from sandbox_image.errors import ToolError
from sandbox_image.protocol import MAX_FILE_BYTES, ExecutionResult, Range, Wire
from sandbox_image.storage.workspace_files import WorkspaceFiles

Encoding = Literal["text", "base64"]


@dataclass(frozen=True)
class ReadFileArguments(Wire):
    """What `read_file` takes. Of a longer file the first `max_bytes` are returned."""

    path: str
    encoding: Encoding = "text"
    max_bytes: Annotated[int, Range(1, MAX_FILE_BYTES)] = MAX_FILE_BYTES


@dataclass(frozen=True)
class WriteFileArguments(Wire):
    """What `write_file` takes. `executable` None keeps the mode of a file that is replaced."""

    path: str
    content: str
    encoding: Encoding = "text"
    executable: bool | None = None


def read_file(files: WorkspaceFiles, arguments: ReadFileArguments) -> ExecutionResult:
    """Return a file's content. Blocks: run it in a thread.

    Raises:
        ToolError: there is no such file, or it is not text in the encoding `text`.
    """
    path = arguments.path
    try:
        with files.file(path) as (descriptor, found):
            content = read_up_to(descriptor, arguments.max_bytes)
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from error
    truncated = found.st_size > len(content)
    if arguments.encoding == "base64":
        output = pieces.encode_base64(content)
    else:
        try:
            # A character that was cut in the middle is left out.
            output = codecs.getincrementaldecoder("utf-8")().decode(content, final=not truncated)
        except UnicodeDecodeError as error:
            raise ToolError(f"{path}: not UTF-8 text (byte {error.start}); ask for encoding base64") from error
    return ExecutionResult(
        success=True, output=output, metadata={"size": found.st_size, "truncated": truncated, "encoding": arguments.encoding}
    )


def write_file(files: WorkspaceFiles, arguments: WriteFileArguments) -> ExecutionResult:
    """Create or replace a file atomically, and create its parent directories. Blocks: run it in a thread.

    Raises:
        ToolError: it cannot be written; the file that was there is untouched.
    """
    path = arguments.path
    content = _decode(arguments)
    try:
        with files.parent(path, create=True) as (directory, name):
            mode = _mode(path, name, directory, arguments.executable)
            _replace(files, directory, name, content, mode)
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from error
    return ExecutionResult(success=True, output=f"wrote {len(content)} bytes to {path}", metadata={"size": len(content)})


def read_up_to(descriptor: int, limit: int) -> bytes:
    """The first bytes of a file, `limit` at most."""
    chunks = []
    while limit > 0 and (chunk := os.read(descriptor, min(limit, 1 << 20))):
        chunks.append(chunk)
        limit -= len(chunk)
    return b"".join(chunks)


def _decode(arguments: WriteFileArguments) -> bytes:
    try:
        if arguments.encoding == "base64":
            return pieces.decode_base64(arguments.content)
        return pieces.encode_text(arguments.content)
    except UnicodeEncodeError as error:
        raise ToolError(f"content: contains a lone surrogate at character {error.start}, which is not text") from error
    except ValueError as error:
        raise ToolError(f"content: not base64: {error}") from error


def _mode(path: str, name: str, directory: int, executable: bool | None) -> int:
    if name == ".":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return 0o755 if executable else 0o644
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise ToolError(f"{path}: not a regular file")
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if executable is None:
        return mode
    return mode | 0o111 if executable else mode & ~0o111


def _replace(files: WorkspaceFiles, directory: int, name: str, content: bytes, mode: int) -> None:
    draft = f".{secrets.token_hex(8)}.tmp"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            files.adopt(file.fileno())
        os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(draft, dir_fd=directory)
        raise
