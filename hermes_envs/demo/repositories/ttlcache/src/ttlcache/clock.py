"""Where a cache takes the time from."""

import time


class MonotonicClock:
    """The seconds since some fixed moment; never goes back."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that only moves when it is told to."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError("time does not go back")
        self._now += seconds
