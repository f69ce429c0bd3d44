"""The `bash` tool: one command in a fresh POSIX shell; no process of it survives the call."""

from __future__ import annotations

import codecs
import posixpath
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from sandbox_image import pieces
from sandbox_image.box.box import Box
from sandbox_image.errors import ToolError
from sandbox_image.protocol import MAX_OUTPUT_BYTES, WORKSPACE, ExecutionResult, Range, Wire

MAX_ENVIRONMENT_BYTES = 64 * 1024


@dataclass(frozen=True)
class BashArguments(Wire):
    """What `bash` takes. `cwd` is relative to the workspace or inside of it; `env` is added to the slot's environment."""

    command: str
    cwd: str | None = None
    env: dict[str, str] | None = None
    max_output_bytes: Annotated[int, Range(1, MAX_OUTPUT_BYTES)] = MAX_OUTPUT_BYTES


class OutputBuffer:
    """Keeps the beginning and the end of a stream, within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._head_limit = limit // 2
        self._tail_limit = limit - self._head_limit
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def write(self, chunk: bytes | bytearray) -> None:
        """Append to the stream."""
        self.total += len(chunk)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        self._tail += chunk
        # Rarely, because each cut moves the whole tail.
        if len(self._tail) > 2 * self._tail_limit:
            del self._tail[: -self._tail_limit]

    def clear(self) -> None:
        """Begin a new stream."""
        self._head.clear()
        self._tail.clear()
        self.total = 0

    @property
    def truncated(self) -> bool:
        """Whether bytes were dropped."""
        return self.total > self._head_limit + self._tail_limit

    def text(self) -> str:
        """What was kept, as text: bytes that are not UTF-8 become U+FFFD, and a line tells how many bytes were dropped."""
        if not self.truncated:
            return (self._head + self._tail).decode("utf-8", "replace")
        head = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(self._head))
        tail = bytes(self._tail[-self._tail_limit :])
        start = next((offset for offset in range(min(4, len(tail))) if tail[offset] & 0xC0 != 0x80), 0)
        dropped = self.total - self._head_limit - self._tail_limit
        return f"{head}\n[... {dropped} bytes dropped ...]\n{tail[start:].decode('utf-8', 'replace')}"


async def bash(box: Box, arguments: BashArguments, timeout_s: float, *, sandboxed: bool) -> ExecutionResult:
    """Run a command; a failing command is an unsuccessful result.

    Raises:
        ToolError: the command cannot be passed to a shell, or its directory or environment cannot be used.
        BoxError: the box died.
    """
    command = await encoded_command(arguments.command)
    cwd, variables = relative_to_workspace(arguments.cwd), variables_of(arguments.env)
    buffer = OutputBuffer(arguments.max_output_bytes)
    start = time.monotonic()
    end = await box.run(command, buffer.write, timeout_s, cwd=cwd, variables=variables)
    if end.expired:
        error: str | None = f"timed out after {timeout_s:g} s"
    elif end.error is not None:
        error = f"cannot start the command: {end.error}"
    else:
        error = None if end.exit_code == 0 else f"exit status {end.exit_code}"
    return ExecutionResult(
        success=error is None,
        output=buffer.text(),
        error=error,
        metadata={
            "exit_code": end.exit_code,
            "timeout": end.expired,
            "truncated": buffer.truncated,
            "output_bytes": buffer.total,
            "duration_s": round(time.monotonic() - start, 6),
            "sandboxed": sandboxed,
        },
    )


async def encoded_command(text: str) -> bytes:
    """As `encoded`, of a text that may be long."""
    return await pieces.offload(len(text), lambda: encoded("command", text))


def encoded(what: str, text: str) -> bytes:
    """A text as the bytes of a program's argument.

    Raises:
        ToolError: it contains characters that no argument can.
    """
    if "\0" in text:
        raise ToolError(f"{what}: contains a NUL character")
    try:
        return pieces.encode_text(text)
    except UnicodeEncodeError as error:
        raise ToolError(f"{what}: contains a lone surrogate at character {error.start}, which is not text") from error


def variables_of(env: Mapping[str, str] | None) -> list[bytes]:
    """Environment variables as `NAME=value`.

    Raises:
        ToolError: an invalid name or value, or too many bytes.
    """
    variables = []
    size = 0
    for name, value in (env or {}).items():
        variables.append(_variable(name, value))
        size += len(variables[-1])
        if size > MAX_ENVIRONMENT_BYTES:
            raise ToolError(f"env: more than {MAX_ENVIRONMENT_BYTES} bytes")
    return variables


def relative_to_workspace(path: str | None) -> bytes:
    """A directory relative to the workspace, as the box takes it; None is the workspace.

    Raises:
        ToolError: it is outside of the workspace.
    """
    if path is None:
        return b""
    whole = posixpath.normpath(posixpath.join(WORKSPACE, path))
    if whole != WORKSPACE and not whole.startswith(f"{WORKSPACE}/"):
        raise ToolError(f"cwd: {path} is outside of the workspace")
    return encoded("cwd", posixpath.relpath(whole, WORKSPACE))


def _variable(name: str, value: str) -> bytes:
    if not name or "=" in name:
        raise ToolError(f"env: {name!r} cannot be the name of a variable")
    return encoded(f"env: {name!r}", f"{name}={value}")
