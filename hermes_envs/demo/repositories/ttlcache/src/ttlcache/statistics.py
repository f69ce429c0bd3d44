"""What a cache has done so far."""

from dataclasses import dataclass


@dataclass
class Statistics:
    """Counts since the start or the last reset.

    ``evictions`` counts entries that were dropped to make room, ``expirations`` those that became too old. What a user removes or
    replaces is in neither.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    expirations: int = 0

    @property
    def lookups(self) -> int:
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits as a share of lookups; 0 before the first one."""
        return self.hits / self.lookups if self.lookups else 0.0

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            evictions=self.evictions + other.evictions,
            expirations=self.expirations + other.expirations,
        )

    def summary(self) -> str:
        """One line for a log."""
        return (
            f"{self.lookups} lookups, {self.hit_rate:.1%} hits, "
            f"{self.evictions} evicted, {self.expirations} expired"
        )
