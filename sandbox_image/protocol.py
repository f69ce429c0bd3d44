"""The wire between a slot server and its clients.

One definition for both ends: the server imports it inside the sandbox, `backends.client` imports it on the host. Only the
standard library is used, so that it starts in a bare container.

Routes (JSON both ways, `Authorization: Bearer TOKEN` when the server has one):

    POST /execute            ExecuteRequest -> ExecutionResult
    POST /batch              [ExecuteRequest] -> [ExecutionResult | Failure] in request order; with
                             `Accept: application/x-ndjson` one BatchLine per result, each as soon as it is there
    POST /reset              ResetRequest -> SlotState
    POST /layers             FreezeRequest -> SlotState
    POST /layers/delete      DeleteLayerRequest -> {"layers": [name]}
    GET  /layers             -> {"layers": [name]}
    GET  /health             -> Health
    GET  /slots              -> {"slots": [SlotState]}
    GET  /openapi.json       -> these routes and messages as an OpenAPI document
    POST /artifacts/read     ArtifactReadRequest -> ArtifactContent
    POST /artifacts/list     ArtifactListRequest -> ArtifactListing
    POST /artifacts/archive  ArtifactArchiveRequest -> ArtifactArchive

A request that cannot be served is answered with the HTTP status of its `ErrorKind` and a `Failure` body. A command that fails
is not such a request: it is an `ExecutionResult` with `success: false`.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Hashable
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Annotated, Any, Literal, Self

VERSION = 2
"""Raised whenever a client and a server of different versions would misunderstand each other."""

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 24 * 3600.0
MAX_REQUEST_BYTES = 128 * 1024 * 1024
MAX_BATCH_ITEMS = 1000
MAX_OUTPUT_BYTES = 1_000_000
"""What is kept of a command's output; the rest is read and thrown away."""
MAX_FILE_BYTES = 5_000_000
"""What `read_file` returns at most."""
DEFAULT_ARTIFACT_BYTES = 5_000_000
MAX_ARTIFACT_BYTES = 64 * 1024 * 1024
DEFAULT_ARTIFACT_ENTRIES = 5_000
MAX_ARTIFACT_ENTRIES = 1_000_000
WORKSPACE_BYTES = 2 * 1024**3
WORKSPACE_INODES = 500_000
"""What a slot may write beside what its layer holds, unless the server was told otherwise."""
LEAST_MEMORY_BYTES = 64 * 1024**2
"""The least memory limit that a slot can have."""
MAX_MEMORY_BYTES = 1 << 60
WORKSPACE = "/workspace"
"""Where a slot's files are, seen from inside of its box."""
RECORDING_PATH = "/recordings/tmux.cast"
"""The artifact that holds what the terminal of `tmux` has shown; out of reach of what runs in the slot."""


class ErrorKind(str, Enum):
    """Why a request was not served. A closed list: a client maps each to one exception."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    OUTSIDE_WORKSPACE = "outside_workspace"
    NOT_FOUND = "not_found"
    LEASE_EXPIRED = "lease_expired"
    TOO_LARGE = "too_large"
    SLOT_FAILED = "slot_failed"
    SHUTTING_DOWN = "shutting_down"
    NO_ROOM = "no_room"

    @property
    def status(self) -> int:
        """The HTTP status that carries this error."""
        return _STATUS[self]


_STATUS = {
    ErrorKind.BAD_REQUEST: 400,
    ErrorKind.UNAUTHORIZED: 401,
    ErrorKind.OUTSIDE_WORKSPACE: 403,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.LEASE_EXPIRED: 409,
    ErrorKind.TOO_LARGE: 413,
    ErrorKind.SLOT_FAILED: 502,
    ErrorKind.SHUTTING_DOWN: 503,
    ErrorKind.NO_ROOM: 507,
}


class ProtocolError(ValueError):
    """A message does not have the form that this module defines; the text names the field."""


def _conforms(value: object, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, option) for option in typing.get_args(expected))
    if origin is Literal:
        return value in typing.get_args(expected)
    if origin is dict and isinstance(value, dict):
        # JSON has no other keys than strings.
        expected = typing.get_args(expected)[1]
        return set(map(type, value.values())) <= _exact_types(expected) or all(
            _conforms(item, expected) for item in value.values()
        )
    if origin is not None:
        return isinstance(value, origin)
    if expected is float:
        # JSON has one number type, and NaN or infinity would break every comparison with a limit.
        return type(value) in (int, float) and abs(typing.cast(float, value)) < float("inf")
    if expected is int:
        return type(value) is int
    return expected is Any or isinstance(value, expected)


def _exact_types(expected: Any) -> frozenset[type]:
    """Types whose values conform without a closer look."""
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return frozenset().union(*map(_exact_types, typing.get_args(expected)))
    if expected in (str, int, bool, types.NoneType):
        return frozenset((expected,))
    return frozenset((origin,)) if origin is list or typing.get_args(expected)[1:] == (Any,) else frozenset()


@dataclass(frozen=True)
class Range:
    """The values that a number may have; `low` itself is one of them unless they begin `above` it."""

    low: int
    high: int | float
    above: bool = False

    def check(self, name: str, value: int | float | None) -> None:
        """Refuse a value out of range; None is not a number.

        Raises:
            ProtocolError: it is.
        """
        if value is None or ((self.low < value if self.above else self.low <= value) and value <= self.high):
            return
        bounds = f"above {self.low} and at most" if self.above else f"between {self.low} and"
        raise ProtocolError(f"field {name!r} must be {bounds} {self.high:.15g}")


@dataclass(frozen=True)
class _Field:
    expected: Any
    exact: frozenset[type]
    required: bool
    range: Range | None


@functools.cache
def _fields(message: Any) -> dict[str, _Field]:
    # Resolving the annotations anew for each message would cost more than all the rest of reading it.
    hints = typing.get_type_hints(message)
    annotations = typing.get_type_hints(message, include_extras=True)
    return {
        spec.name: _Field(
            hints[spec.name],
            _exact_types(hints[spec.name]),
            spec.default is MISSING and spec.default_factory is MISSING,
            range_of(annotations[spec.name]),
        )
        for spec in fields(message)
    }


def range_of(annotation: Any) -> Range | None:
    """The range that a field is annotated with."""
    return next((extra for extra in typing.get_args(annotation)[1:] if isinstance(extra, Range)), None)


@dataclass(frozen=True)
class Wire:
    """A message of the protocol: a dataclass that reads itself strictly from JSON."""

    @classmethod
    def from_json(cls, payload: object) -> Self:
        """Build from a decoded JSON value.

        Raises:
            ProtocolError: not an object, a missing or unknown field, or a value of another type or out of range.
        """
        if not isinstance(payload, dict):
            raise ProtocolError(f"expected a JSON object, got {type(payload).__name__}")
        known = _fields(typing.cast(Hashable, cls))
        for name, value in payload.items():
            spec = known.get(name)
            if spec is None:
                raise ProtocolError(f"unknown field {name!r}; known fields: {', '.join(known)}")
            if type(value) not in spec.exact and not _conforms(value, spec.expected):
                raise ProtocolError(f"field {name!r} has the wrong type: {type(value).__name__}")
            if spec.range is not None:
                spec.range.check(name, value)
        for name, spec in known.items():
            if spec.required and name not in payload:
                raise ProtocolError(f"missing field {name!r}")
        return cls(**payload)

    def check(self) -> None:
        """Refuse what the types of the fields cannot; nothing, unless a message says so.

        Raises:
            ProtocolError: a value is not one that anybody should send.
        """

    def to_json(self) -> dict[str, Any]:
        """The message as a value that `json.dumps` takes; it shares the message's lists and dictionaries."""
        return dict(vars(self))


@dataclass(frozen=True)
class ExecuteRequest(Wire):
    """Run one tool in one slot.

    `lease` is the slot's lease as `/reset` gave it: a call with another one is refused with `LEASE_EXPIRED`, so that a
    trajectory never continues in a workspace that is not its own any more. Without it the check is skipped.
    `timeout` is in seconds. A second request with a known `execution_id` gets the first one's result.
    """

    slot_id: str
    tool: str
    args: dict[str, Any]
    execution_id: str | None = None
    timeout: Annotated[float | None, Range(0, MAX_TIMEOUT_S, above=True)] = None
    lease: str | None = None


@dataclass(frozen=True)
class ExecutionResult(Wire):
    """What a tool did. `output` of a command is its standard output and error, in the order they were written.

    Metadata of `bash`: `exit_code` (int; 128 + N for signal N, None on timeout), `timeout` (bool), `truncated` (bool: some
    output was dropped), `output_bytes` (int: all that was written), `duration_s` (float), `sandboxed` (bool), and where the
    server can tell `oom_killed` (bool: a process of the slot was killed because its memory was used up).

    `bash_stateful` has these and `shell_restarted` (bool: this ran in a fresh shell, the one before had ended), `shell_ended`
    (bool: the shell ended with this command), `shell_replaced` (bool: it was killed, because a command whose time ran out could
    not be interrupted), and `background_output` (str) if background jobs printed something after their calls.

    `tmux` has `action`, `truncated`, `sandboxed`, `duration_s`; where the output is what the terminal shows `pane_width`,
    `pane_height`, `cursor` (column and line, from 0) and `alternate_screen` (bool); `send_keys` has `timeout` (bool: what
    `block` waits for did not come in time) and `terminal_ended` if its shell ended; `stream` has `events` (int), `more` (bool:
    ask again) and `recording_full` (bool: what came last was not recorded).
    """

    success: bool
    output: str
    error: str | None = None
    execution_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure(Wire):
    """Why a request was not served."""

    kind: str
    error: str
    execution_id: str | None = None


@dataclass(frozen=True)
class BatchLine(Wire):
    """One line of a streamed `/batch` answer: exactly one of `result` and `failure` is set."""

    index: int
    result: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None


@dataclass(frozen=True)
class ResetRequest(Wire):
    """Give a slot a new box, a new workspace and a new lease.

    The workspace starts with the files of `layer` (a name that `/layers` gave) or empty. `network` lets the box reach the
    network. `for_layer` says that the workspace is going to be frozen: its files then lie where a layer's do and need not be
    copied; their size and number are not limited. `memory_bytes` lowers the slot's memory limit until the next reset; without
    it, or where it is higher, the limit is the server's.
    """

    slot_id: str
    layer: str | None = None
    network: bool = False
    for_layer: bool = False
    memory_bytes: Annotated[int | None, Range(LEAST_MEMORY_BYTES, MAX_MEMORY_BYTES)] = None


@dataclass(frozen=True)
class FreezeRequest(Wire):
    """Keep a slot's workspace as the read-only layer `name`; the slot itself is reset to an empty workspace.

    A `snapshot` is a copy of what is in the workspace when the calls before it have ended, and the slot goes on. It stays until
    `/layers/delete`; other layers are deleted when the room for layers is used up and no slot stands on them.
    """

    slot_id: str
    name: str
    lease: str | None = None
    snapshot: bool = False


@dataclass(frozen=True)
class DeleteLayerRequest(Wire):
    """Delete a layer. Slots that stand on it go on."""

    name: str


@dataclass(frozen=True)
class SlotState(Wire):
    """A slot as the server sees it.

    `memory_bytes` is what all its processes may use together; None where only each process has a limit.
    """

    slot_id: str
    lease: str
    state: Literal["ready", "busy", "failed"]
    layer: str | None = None
    network: bool = False
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Health(Wire):
    """What the server is and which defences hold.

    `isolation` is `bubblewrap` or `none`; `limits` names what is enforced; `defences` has, by name, an object with `holds`
    (bool) and `detail` (str: what was seen in a running box, or what takes the place of a missing defence).
    """

    status: str
    version: int
    slots: int
    busy: int
    isolation: str
    data_dir: str
    uptime_s: float
    limits: dict[str, Any] = field(default_factory=dict)
    defences: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArtifactReadRequest(Wire):
    """Read one regular file of a slot's workspace, whole or not at all."""

    slot_id: str
    path: str
    encoding: Literal["text", "base64"] = "text"
    max_bytes: Annotated[int, Range(1, MAX_ARTIFACT_BYTES)] = DEFAULT_ARTIFACT_BYTES
    include_sha256: bool = False
    lease: str | None = None


@dataclass(frozen=True)
class ArtifactContent(Wire):
    """A file's content; `size` is in bytes, `sha256` is of the whole file."""

    content: str
    encoding: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class ArtifactListRequest(Wire):
    """List a directory of a slot's workspace."""

    slot_id: str
    path: str = "."
    recursive: bool = False
    max_entries: Annotated[int, Range(1, MAX_ARTIFACT_ENTRIES)] = DEFAULT_ARTIFACT_ENTRIES
    lease: str | None = None


@dataclass(frozen=True)
class ArtifactListing(Wire):
    """Entries sorted by path: `{"path", "type": file|directory|symlink|other, "size", "mode"}`."""

    entries: list[dict[str, Any]]
    truncated: bool


@dataclass(frozen=True)
class ArtifactArchiveRequest(Wire):
    """Pack a directory of a slot's workspace: regular files, directories and symbolic links (as links)."""

    slot_id: str
    path: str = "."
    format: Literal["tar.gz", "tgz"] = "tar.gz"
    max_bytes: Annotated[int, Range(1, MAX_ARTIFACT_BYTES)] = DEFAULT_ARTIFACT_BYTES
    max_entries: Annotated[int, Range(1, MAX_ARTIFACT_ENTRIES)] = DEFAULT_ARTIFACT_ENTRIES
    lease: str | None = None


@dataclass(frozen=True)
class ArtifactArchive(Wire):
    """A gzip-compressed tar archive as base64; `size` is of the archive, in bytes."""

    content: str
    size: int
    entries: int
