import pytest
from recorder import Recorder

from ttlcache import Cache, make_key, memoize


def memoized(cache, typed=False):
    recorder = Recorder(result=7)

    @memoize(cache, typed=typed)
    def function(*args, **kwargs):
        """Documented."""
        return recorder(*args, **kwargs)

    return function, recorder


def test_called_once_for_the_same_arguments(cache):
    function, recorder = memoized(cache)
    assert function(1, b=2) == function(1, b=2) == 7
    assert len(recorder.calls) == 1
    assert function.__doc__ == "Documented."


def test_order_of_named_arguments():
    assert make_key((), {"a": 1, "b": 2}) == make_key((), {"b": 2, "a": 1})
    assert make_key((1,), {}) != make_key((), {"a": 1})
    assert make_key((1,), {"a": 1}) != make_key((1,), {"b": 1})


@pytest.mark.parametrize(("typed", "calls"), [(False, 1), (True, 2)], ids=["1 == 1.0", "1 is not 1.0 [typed]"])
def test_typed(cache, typed, calls):
    function, recorder = memoized(cache, typed)
    function(1)
    function(1.0)
    assert len(recorder.calls) == calls


def test_typed_named_arguments():
    assert make_key((), {"a": 1}, typed=True) != make_key((), {"a": 1.0}, typed=True)


def test_expired_results_are_computed_again(cache, clock):
    function, recorder = memoized(cache)
    function()
    clock.advance(10)
    function()
    assert len(recorder.calls) == 2


def test_functions_share_a_cache(clock):
    cache = Cache(10, clock=clock)
    first, _ = memoized(cache)
    second, recorder = memoized(cache)
    first(1)
    second(1)
    assert len(recorder.calls) == 1


def test_exceptions_are_not_kept(cache):
    calls = []

    @memoize(cache)
    def fail():
        calls.append(1)
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
    assert len(calls) == 2


def test_forget(cache):
    function, recorder = memoized(cache)
    function(1)
    assert function.forget(1) is True
    assert function.forget(1) is False
    function(1)
    assert len(recorder.calls) == 2
