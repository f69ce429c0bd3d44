"""Sandboxes: slots to run tools in, wherever they come from."""

from __future__ import annotations

from typing import TypeVar, cast

from pydantic import Field, create_model

from backends.base import BackendStats, Layer, Slot, Snapshot, ToolBackend
from backends.errors import (
    AcquireTimeoutError,
    ArtifactError,
    ArtifactForbiddenError,
    ArtifactNotFoundError,
    ArtifactTooLargeError,
    BackendConfigError,
    ExecutionTimeoutError,
    SandboxError,
    SandboxProtocolError,
    SandboxUnavailableError,
    SlotLostError,
    SnapshotError,
)
from backends.local import LocalBackend, LocalOptions
from backends.options import PoolOptions
from backends.registry import Registry

__all__ = [
    "AcquireTimeoutError",
    "ArtifactError",
    "ArtifactForbiddenError",
    "ArtifactNotFoundError",
    "ArtifactTooLargeError",
    "BackendConfigError",
    "BackendOptions",
    "BackendStats",
    "ExecutionTimeoutError",
    "Layer",
    "LocalBackend",
    "LocalOptions",
    "PoolOptions",
    "SandboxError",
    "SandboxProtocolError",
    "SandboxUnavailableError",
    "Slot",
    "SlotLostError",
    "Snapshot",
    "SnapshotError",
    "ToolBackend",
    "create_tool_backend",
    "options_with",
]

BACKENDS = Registry(
    kind=lambda: ToolBackend,
    group="hermes_envs.backends",
    option="tool_pool_mode",
    built_in={"local": "backends.local:LocalBackend"},
    error=BackendConfigError,
)


class BackendOptions(LocalOptions):
    """The options of all built-in backends, of which `tool_pool_mode` chooses one."""

    tool_pool_mode: str = Field("local", description="Where slots come from: the name of a backend, or `package.module:Class`.")


Options = TypeVar("Options", bound=BackendOptions)


def options_with(options: type[Options], mode: str) -> type[Options]:
    """`options` with those of the backend that `mode` names, as far as they are not among them; `mode` is the default then.

    Raises:
        BackendConfigError: there is no such backend.
    """
    own = BACKENDS.load(mode).options_class
    if issubclass(options, own):
        return options
    bases = cast("tuple[type[Options], ...]", (options, own))
    chosen = (str, Field(mode, description=BackendOptions.model_fields["tool_pool_mode"].description))
    return create_model(
        options.__name__, __base__=bases, __doc__=options.__doc__, __module__=options.__module__, tool_pool_mode=chosen
    )


def create_tool_backend(options: BackendOptions) -> ToolBackend:
    """The backend that `tool_pool_mode` names, not started yet.

    Raises:
        BackendConfigError: there is no such backend, or `options` are of a class that lacks its own (see `options_with`).
    """
    backend = BACKENDS.load(options.tool_pool_mode)
    if not isinstance(options, backend.options_class):
        raise BackendConfigError(
            f"tool_pool_mode: {options.tool_pool_mode!r} has options of its own, {backend.options_class.__name__}, which "
            f"{type(options).__name__} lacks"
        )
    return backend(options)
