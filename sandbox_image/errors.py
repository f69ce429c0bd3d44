"""What can go wrong in the slot server.

SlotServerError               everything below; the text is one line for a person
├── StartupError              the server cannot run here; the text says why and what would help
├── BoxError                  a box does not start, does not answer or died
│   └── MissingDefenceError   it runs, but is not closed
├── RequestError              a request that cannot be served; carries its `ErrorKind`
└── ToolError                 the arguments or the files of a tool call are at fault: an unsuccessful result
    └── OutsideWorkspaceError a path leads out of the workspace
"""

from __future__ import annotations

import re

from sandbox_image.protocol import ErrorKind

MAX_MESSAGE_CHARACTERS = 8192
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class SlotServerError(Exception):
    """Any failure that the slot server knows by name."""

    def __init__(self, message: str) -> None:
        # Messages quote file names and requests, which may contain anything.
        super().__init__(_CONTROL_CHARACTER.sub(lambda found: repr(found[0])[1:-1], message[:MAX_MESSAGE_CHARACTERS]))


class StartupError(SlotServerError):
    """The server cannot run on this machine with these options."""


class BoxError(SlotServerError):
    """A box does not start, does not answer or died."""


class MissingDefenceError(BoxError):
    """A box runs without a defence that is required; the text names the defence and the remedy."""


class RequestError(SlotServerError):
    """A request that cannot be served."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ToolError(SlotServerError):
    """A tool call that cannot succeed as it was asked for."""


class OutsideWorkspaceError(ToolError):
    """A path leads out of the workspace."""
