import pytest

from ttlcache import CacheRegions


@pytest.fixture
def regions(clock):
    return CacheRegions({"users": "2 entries, 1m30s", "pages": "1 entry", "bad": "many", "odd": "2 things, 1m"}, clock=clock)


def test_settings(regions):
    users = regions.region("users")
    assert (users.max_weight, users.ttl) == (2, 90)
    assert regions.region("pages").ttl is None
    assert regions.region("users") is users


@pytest.mark.parametrize("name", ["bad", "odd"])
def test_unreadable_settings(regions, name):
    with pytest.raises(ValueError, match="expected '500 entries, 10m'"):
        regions.region(name)


def test_no_settings(regions):
    with pytest.raises(KeyError):
        regions.region("unknown")
    assert CacheRegions({"default": "5 entries"}).region("unknown").max_weight == 5


def test_statistics_are_summed(regions):
    regions.region("users").get("nobody")
    regions.region("pages").put("home", "<html>")
    regions.region("pages").get("home")
    regions.region("pages").put("help", "<html>")
    total = regions.statistics()
    assert (total.hits, total.misses, total.evictions) == (1, 1, 1)
    assert total.hit_rate == 0.5


def test_report(regions, clock):
    regions.region("users").put("ann", 1)
    regions.region("pages").put("home", 2)
    clock.advance(90)
    regions.region("users").get("ann")
    assert regions.report().splitlines() == [
        "pages: 1 of 1, kept for ever, 0 lookups, 0.0% hits, 0 evicted, 0 expired",
        "users: 0 of 2, kept 1m30s, 1 lookups, 0.0% hits, 0 evicted, 1 expired",
    ]
