"""A bounded cache with expiry and statistics."""

from ttlcache.cache import Cache
from ttlcache.clock import ManualClock, MonotonicClock
from ttlcache.durations import format_duration, parse_duration
from ttlcache.memoize import make_key, memoize
from ttlcache.regions import CacheRegions
from ttlcache.statistics import Statistics

__all__ = [
    "Cache",
    "CacheRegions",
    "ManualClock",
    "MonotonicClock",
    "Statistics",
    "format_duration",
    "make_key",
    "memoize",
    "parse_duration",
]
