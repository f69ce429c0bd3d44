import pytest

from ttlcache import Cache, ManualClock


@pytest.fixture
def clock():
    return ManualClock(start=1000.0)


@pytest.fixture
def cache(clock):
    """Three entries for ten seconds."""
    return Cache(max_weight=3, ttl=10, clock=clock)
