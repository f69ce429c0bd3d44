"""Encodes requests to a slot server and decodes its answers, which are not trusted.

Answers are decoded strictly and exceptions are chosen from a closed table. The server's own text appears in their messages
only, shortened and without control characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from backends.errors import (
    ArtifactError,
    ArtifactForbiddenError,
    ArtifactNotFoundError,
    ArtifactTooLargeError,
    SandboxError,
    SandboxProtocolError,
    SandboxUnavailableError,
    SlotLostError,
    SnapshotError,
)
from sandbox_image.protocol import (
    DEFAULT_TIMEOUT_S,
    MAX_REQUEST_BYTES,
    BatchLine,
    ErrorKind,
    ExecuteRequest,
    ExecutionResult,
    Failure,
    ProtocolError,
    Wire,
)

_SHOWN_CHARS = 2000


class RefusedError(SandboxProtocolError):
    """The server rejected the request as malformed; it was not executed."""


class MissingError(SandboxProtocolError):
    """The request names a slot, route or layer that does not exist."""


_EXCEPTIONS: Mapping[ErrorKind, type[SandboxError]] = {
    ErrorKind.BAD_REQUEST: RefusedError,
    ErrorKind.UNAUTHORIZED: SandboxUnavailableError,
    ErrorKind.OUTSIDE_WORKSPACE: ArtifactForbiddenError,
    ErrorKind.NOT_FOUND: ArtifactNotFoundError,
    ErrorKind.LEASE_EXPIRED: SlotLostError,
    ErrorKind.TOO_LARGE: ArtifactTooLargeError,
    ErrorKind.SLOT_FAILED: SlotLostError,
    ErrorKind.SHUTTING_DOWN: SandboxUnavailableError,
    ErrorKind.NO_ROOM: SnapshotError,
}

Message = TypeVar("Message", bound=Wire)
Outcome = ExecutionResult | SandboxError


@dataclass(frozen=True)
class EncodedCall:
    """An encoded `ExecuteRequest`. `timeout_s` is the timeout of the tool, without the time for the way."""

    slot_id: str
    execution_id: str | None
    timeout_s: float
    body: bytes

    @classmethod
    def of(cls, request: ExecuteRequest) -> EncodedCall:
        """Encode a request.

        Raises:
            SandboxProtocolError: the arguments are not JSON, or too large to be sent.
        """
        timeout_s = DEFAULT_TIMEOUT_S if request.timeout is None else request.timeout
        body = encode(request)
        if len(body) > MAX_REQUEST_BYTES:
            raise SandboxProtocolError(f"the call has {len(body)} bytes, {MAX_REQUEST_BYTES} at most")
        return cls(request.slot_id, request.execution_id, timeout_s, body)


def encode(message: Wire) -> bytes:
    """Encode a message as JSON.

    Raises:
        SandboxProtocolError: the message has a value that JSON cannot represent.
    """
    try:
        # The messages are flat: `vars` spares the deep copy that `asdict` makes of the arguments.
        return json.dumps(vars(message), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SandboxProtocolError(f"the request cannot be written as JSON: {error}") from error


def decode(payload: bytes) -> object:
    """Decode the JSON of an answer. Raises `SandboxProtocolError`."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SandboxProtocolError(f"the server's answer is not JSON: {shown(repr(payload[:100]))}") from error


def read_message(kind: type[Message], value: object) -> Message:
    """Convert a decoded answer to a message. Raises `SandboxProtocolError`."""
    try:
        return kind.from_json(value)
    except ProtocolError as error:
        raise SandboxProtocolError(f"the server's answer is not a {kind.__name__}: {shown(str(error))}") from error


def shown(text: str) -> str:
    """Make text of the server fit for a message or a log: at most 2,000 characters, control characters escaped."""
    printable = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_SHOWN_CHARS])
    return printable if len(text) <= _SHOWN_CHARS else printable + "..."


def exception_of(value: object, *, artifact: bool) -> SandboxError:
    """The exception for a decoded `Failure`; `artifact` says whether an artifact was requested."""
    failure = read_message(Failure, value)
    try:
        kind = ErrorKind(failure.kind)
    except ValueError:
        return SandboxProtocolError(f"the server failed with an unknown kind {shown(failure.kind)!r}: {shown(failure.error)}")
    chosen = _EXCEPTIONS[kind]
    if issubclass(chosen, ArtifactError) and not artifact:
        chosen = MissingError if kind is ErrorKind.NOT_FOUND else SandboxProtocolError
    if kind is ErrorKind.TOO_LARGE and not artifact:
        chosen = RefusedError
    return chosen(shown(failure.error))


def read_result(call: EncodedCall, value: object) -> ExecutionResult:
    """Convert a decoded answer to the result of `call`. Raises `SandboxProtocolError`, also for the result of another call."""
    result = read_message(ExecutionResult, value)
    if result.execution_id != call.execution_id:
        raise SandboxProtocolError("the server answered with the result of another call")
    return result


def read_line(line: bytes, calls: Sequence[EncodedCall]) -> tuple[int, Outcome]:
    """Decode a line of a streamed batch: the index of a call and its outcome. Raises `SandboxProtocolError`."""
    message = read_message(BatchLine, decode(line))
    if not 0 <= message.index < len(calls) or (message.result is None) == (message.failure is None):
        raise SandboxProtocolError(f"the server's answer has a line that fits no call: {shown(repr(line[:100]))}")
    if message.failure is not None:
        return message.index, exception_of(message.failure, artifact=False)
    return message.index, read_result(calls[message.index], message.result)


def read_list(answer: object, name: str) -> list[Any]:
    """The value of an answer's only field, a list. Raises `SandboxProtocolError`."""
    if isinstance(answer, dict) and set(answer) == {name} and isinstance(values := answer[name], list):
        return values
    raise SandboxProtocolError(f"the server's answer is not an object with the list {name!r}")
