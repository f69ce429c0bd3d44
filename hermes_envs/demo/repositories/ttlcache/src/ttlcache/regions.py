"""Several caches under one roof, set up from text."""

from typing import Dict, Iterator, Mapping, Optional

from ttlcache.cache import Cache, Clock
from ttlcache.durations import format_duration, parse_duration
from ttlcache.statistics import Statistics


class CacheRegions:
    """Named caches, made on first use from settings such as ``{"users": "500 entries, 10m", "pages": "20 entries"}``.

    The settings of ``default`` are for every other name.
    """

    def __init__(self, settings: Mapping[str, str], clock: Optional[Clock] = None) -> None:
        self._settings = dict(settings)
        self._clock = clock
        self._caches: Dict[str, Cache] = {}

    def __iter__(self) -> Iterator[str]:
        """The names of the caches in use."""
        return iter(sorted(self._caches))

    def region(self, name: str) -> Cache:
        """The cache of that name, the same one each time.

        Raises:
            KeyError: there are no settings for it and none for ``default``.
            ValueError: its settings cannot be read.
        """
        if name not in self._caches:
            settings = self._settings.get(name, self._settings.get("default"))
            if settings is None:
                raise KeyError(name)
            self._caches[name] = self._make(settings)
        return self._caches[name]

    def _make(self, settings: str) -> Cache:
        size, comma, duration = settings.partition(",")
        count, _, unit = size.strip().partition(" ")
        if unit not in ("entry", "entries") or not count.isdigit():
            raise ValueError(f"cannot read {settings!r}: expected '500 entries, 10m'")
        ttl = parse_duration(duration) if comma else None
        return Cache(int(count), ttl=ttl, clock=self._clock)

    def statistics(self) -> Statistics:
        """The sum over all caches in use."""
        return sum((cache.statistics for cache in self._caches.values()), Statistics())

    def report(self) -> str:
        """One line for each cache in use."""
        lines = []
        for name in self:
            cache = self._caches[name]
            life = "for ever" if cache.ttl is None else format_duration(cache.ttl)
            lines.append(f"{name}: {len(cache)} of {cache.max_weight}, kept {life}, {cache.statistics.summary()}")
        return "\n".join(lines)
