import pytest
from recorder import Recorder

from ttlcache import Cache


def fill(cache, keys):
    for key in keys:
        cache.put(key, key.upper())


def test_get_and_put(cache):
    cache.put("a", 1)
    assert cache.get("a") == 1
    assert cache.get("b") is None
    assert cache.get("b", "default") == "default"


def test_oldest_is_evicted(cache):
    fill(cache, "abcd")
    assert list(cache) == ["b", "c", "d"]


def test_lookup_counts_as_use(cache):
    fill(cache, "abc")
    cache.get("a")
    cache.put("d", "D")
    assert list(cache) == ["c", "a", "d"]


def test_replacing_counts_as_use(cache):
    fill(cache, "abca")
    assert list(cache) == ["b", "c", "a"]
    assert cache.weight == 3


@pytest.mark.parametrize("look", [lambda cache: "a" in cache, lambda cache: cache.peek("a")], ids=["[in]", "peek [no use]"])
def test_looking_without_using(cache, look):
    fill(cache, "abc")
    assert look(cache)
    cache.put("d", "D")
    assert "a" not in cache
    assert cache.statistics.lookups == 0


def test_heavy_entries(cache):
    fill(cache, "ab")
    cache.put("c", "C", weight=2)
    assert list(cache) == ["b", "c"]
    cache.put("d", "D", weight=3)
    assert list(cache) == ["d"]
    assert cache.weight == 3


@pytest.mark.parametrize("weight", [-1, 0, 4], ids=lambda weight: f"weight {weight}")
def test_impossible_weight(cache, weight):
    cache.put("a", 1)
    with pytest.raises(ValueError, match="does not fit"):
        cache.put("a", 2, weight=weight)
    assert cache.get("a") == 1


def test_evicted_entries_are_reported(clock):
    on_evict = Recorder()
    cache = Cache(2, clock=clock, on_evict=on_evict)
    fill(cache, "abc")
    cache.remove("b")
    assert on_evict.calls == [(("a", "A"), {})]


@pytest.mark.parametrize(("age", "alive"), [(9.9, True), (10, False), (11, False)], ids=["9.9 s", "exactly [10 s]", "11 s"])
def test_expiry(cache, clock, age, alive):
    cache.put("a", 1)
    clock.advance(age)
    assert ("a" in cache) is alive
    assert len(cache) == int(alive)
    assert (cache.get("a") == 1) is alive


def test_replacing_starts_the_age_anew(cache, clock):
    cache.put("a", 1)
    clock.advance(6)
    cache.put("a", 2)
    clock.advance(6)
    assert cache.get("a") == 2


def test_own_ttl(cache, clock):
    cache.put("a", 1, ttl=100)
    cache.put("b", 2)
    clock.advance(50)
    assert list(cache) == ["a"]
    assert cache.remaining("a") == 50
    with pytest.raises(KeyError):
        cache.remaining("b")


def test_expired_entries_make_room_first(cache, clock):
    cache.put("long", 1, ttl=100)
    fill(cache, "ab")
    clock.advance(20)
    cache.put("c", 3)
    assert list(cache) == ["long", "c"]
    assert cache.statistics.evictions == 0
    assert cache.statistics.expirations == 2


def test_purge(cache, clock):
    fill(cache, "ab")
    clock.advance(5)
    cache.put("c", 3)
    clock.advance(5)
    assert cache.purge() == ["a", "b"]
    assert cache.weight == 1


def test_none_is_a_value(cache):
    create = Recorder(result=None)
    assert cache.get_or_create("a", create) is None
    assert cache.get_or_create("a", create) is None
    assert len(create.calls) == 1


def test_statistics(cache, clock):
    fill(cache, "abcd")
    cache.get("b")
    cache.get("a")
    clock.advance(10)
    cache.get("c")
    statistics = cache.statistics
    assert (statistics.hits, statistics.misses, statistics.evictions, statistics.expirations) == (1, 2, 1, 1)
    assert statistics.summary() == "3 lookups, 33.3% hits, 1 evicted, 1 expired"


def test_clear_keeps_the_statistics(cache):
    fill(cache, "abcd")
    cache.clear()
    assert cache.weight == 0
    assert cache.statistics.evictions == 1
    assert cache.statistics.hit_rate == 0.0


@pytest.mark.parametrize(("max_weight", "ttl"), [(0, None), (1, 0), (1, -1)])
def test_impossible_limits(max_weight, ttl):
    with pytest.raises(ValueError):
        Cache(max_weight, ttl=ttl)
