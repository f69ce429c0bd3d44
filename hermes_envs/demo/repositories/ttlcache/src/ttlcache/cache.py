"""The cache itself."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, Hashable, Iterator, List, Optional, Protocol

from ttlcache.clock import MonotonicClock
from ttlcache.statistics import Statistics


class Clock(Protocol):
    def now(self) -> float: ...


@dataclass
class _Entry:
    value: Any
    weight: int
    expires: Optional[float]


_MISSING = object()


class Cache:
    """A mapping that forgets.

    Room is made by dropping what was not used for the longest time, once the weights of all entries (1 each, if nothing else is
    said) exceed ``max_weight``. An entry that has lived for ``ttl`` seconds is no longer there. Looking up and replacing an entry
    count as use; ``in``, ``peek`` and iteration do not.
    """

    def __init__(
        self,
        max_weight: int,
        ttl: Optional[float] = None,
        clock: Optional[Clock] = None,
        on_evict: Optional[Callable[[Hashable, Any], None]] = None,
    ) -> None:
        if max_weight < 1:
            raise ValueError("a cache needs room for at least one entry")
        if ttl is not None and ttl <= 0:
            raise ValueError("entries have to live for a moment")
        self.max_weight = max_weight
        self.ttl = ttl
        self.statistics = Statistics()
        self._clock = clock or MonotonicClock()
        self._on_evict = on_evict
        self._entries: "OrderedDict[Hashable, _Entry]" = OrderedDict()
        self._weight = 0

    @property
    def weight(self) -> int:
        """The weights of all entries that are held, expired or not."""
        return self._weight

    def __len__(self) -> int:
        """The count of entries that have not expired."""
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Hashable]:
        """The keys that have not expired, least recently used first."""
        now = self._clock.now()
        return iter([key for key, entry in self._entries.items() if not self._is_expired(entry, now)])

    def __contains__(self, key: Hashable) -> bool:
        return self.peek(key, _MISSING) is not _MISSING

    def _is_expired(self, entry: _Entry, now: float) -> bool:
        return entry.expires is not None and now >= entry.expires

    def put(self, key: Hashable, value: Any, weight: int = 1, ttl: Optional[float] = None) -> None:
        """Add or replace an entry; its age starts anew. ``ttl`` overrides the cache's own.

        Raises:
            ValueError: the entry alone is heavier than the cache allows, or its weight is not positive.
        """
        if not 0 < weight <= self.max_weight:
            raise ValueError(f"an entry of weight {weight} does not fit into {self.max_weight}")
        self.remove(key)
        life = self.ttl if ttl is None else ttl
        expires = None if life is None else self._clock.now() + life
        self._entries[key] = _Entry(value, weight, expires)
        self._weight += weight
        if self._weight > self.max_weight:
            self.purge()
        while self._weight > self.max_weight:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        key, entry = self._entries.popitem(last=False)
        self._weight -= entry.weight
        self.statistics.evictions += 1
        if self._on_evict is not None:
            self._on_evict(key, entry.value)

    def get(self, key: Hashable, default: Any = None) -> Any:
        """Look an entry up: counts as a hit or a miss, and as use."""
        entry = self._entries.get(key)
        if entry is not None and self._is_expired(entry, self._clock.now()):
            self.remove(key)
            self.statistics.expirations += 1
            entry = None
        if entry is None:
            self.statistics.misses += 1
            return default
        self.statistics.hits += 1
        self._entries.move_to_end(key)
        return entry.value

    def peek(self, key: Hashable, default: Any = None) -> Any:
        """Look an entry up without leaving a trace."""
        entry = self._entries.get(key)
        if entry is None or self._is_expired(entry, self._clock.now()):
            return default
        return entry.value

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        """The entry's value, or what ``create`` returns, which is kept. None is a value like any other."""
        value = self.get(key, _MISSING)
        if value is _MISSING:
            value = create()
            self.put(key, value)
        return value

    def remaining(self, key: Hashable) -> Optional[float]:
        """The seconds that an entry has left; None if it lives for ever.

        Raises:
            KeyError: there is no such entry.
        """
        if key not in self:
            raise KeyError(key)
        expires = self._entries[key].expires
        return None if expires is None else expires - self._clock.now()

    def remove(self, key: Hashable) -> bool:
        """Drop an entry; whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._weight -= entry.weight
        return True

    def purge(self) -> List[Hashable]:
        """Drop everything that has expired and return the keys."""
        now = self._clock.now()
        expired = [key for key, entry in self._entries.items() if self._is_expired(entry, now)]
        for key in expired:
            self.remove(key)
        self.statistics.expirations += len(expired)
        return expired

    def clear(self) -> None:
        """Drop everything; the statistics stay."""
        self._entries.clear()
        self._weight = 0
