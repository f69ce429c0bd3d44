"""Commands of a box: the one of the current call, and kept ones that outlive calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sandbox_image.box.channel import InitChannel


@dataclass
class RunningCommand:
    """The command of the current call; `sink` takes its output."""

    number: bytes
    sink: Callable[[bytearray], None]
    expired: bool = False


@dataclass(frozen=True)
class CommandEnd:
    """How a command ended.

    `exit_code` is 128 + N for signal N, and None if the time ran out (`expired`) or the command was not started (`error`).
    """

    exit_code: int | None
    expired: bool = False
    error: str | None = None


class KeptCommand:
    """A command that runs beside those of the calls until it ends or is killed."""

    def __init__(self, channel: InitChannel, number: bytes) -> None:
        self._channel = channel
        self._number = number
        self.ended = channel.exit_of(number)
        """Its exit status (128 + N for signal N), set when it and its descendants are dead; a `BoxError` if the box died."""

    def interrupt(self) -> None:
        """Send SIGINT to its process group.

        Raises:
            BoxError: the box died.
        """
        self._channel.order(b"interrupt", self._number)

    def kill(self) -> None:
        """Kill it and its descendants; returns before they are dead.

        Raises:
            BoxError: the box died.
        """
        self._channel.order(b"kill", self._number)
