"""What can go wrong with a sandbox.

    SandboxError                  every failure of infrastructure; never a model's fault
    ├── BackendConfigError        what is configured, or asked for, cannot work here; retrying is useless
    ├── SandboxUnavailableError   a sandbox cannot be started or does not answer
    │   └── AcquireTimeoutError   no slot became free in time
    ├── SlotLostError             the slot's workspace is gone: server restarted, lease expired, box died
    ├── ExecutionTimeoutError     the server did not answer within the tool's timeout plus a margin
    ├── SnapshotError             a snapshot cannot be made, or is not where it is wanted
    ├── SandboxProtocolError      the server answered something that is not the protocol
    └── ArtifactError             an artifact request that cannot be served; the message says why
        ├── ArtifactNotFoundError
        ├── ArtifactForbiddenError
        └── ArtifactTooLargeError

A command that fails, times out or does not exist is not here: that is an `ExecutionResult`.
"""

from __future__ import annotations


class SandboxError(Exception):
    """Any failure of the sandbox infrastructure."""


class BackendConfigError(SandboxError):
    """The backend's options cannot work on this machine, or rule out the slot that is asked for; the message says which."""


class SandboxUnavailableError(SandboxError):
    """A sandbox cannot be started or does not answer."""


class AcquireTimeoutError(SandboxUnavailableError):
    """No slot became free within `acquire_timeout_s`."""


class SlotLostError(SandboxError):
    """The slot and the files in it are gone; the trajectory has to start again on another one."""


class ExecutionTimeoutError(SandboxError):
    """The server did not answer within the tool's timeout plus a margin."""


class SandboxProtocolError(SandboxError):
    """The server answered with something that is not the protocol, or refused the request as malformed."""


class SnapshotError(SandboxError):
    """A snapshot cannot be made, is gone, or is in another sandbox than the slot."""


class ArtifactError(SandboxError):
    """An artifact request that cannot be served."""


class ArtifactNotFoundError(ArtifactError):
    """There is no such path in the workspace."""


class ArtifactForbiddenError(ArtifactError):
    """The path leads out of the workspace or is not a regular file."""


class ArtifactTooLargeError(ArtifactError):
    """The artifact has more bytes or entries than were asked for."""
