"""Remembering a function's results."""

import functools
from typing import Any, Callable, Hashable, Mapping, Sequence, TypeVar

from ttlcache.cache import Cache

Wrapped = TypeVar("Wrapped", bound=Callable[..., Any])


def make_key(positional: Sequence[Any], named: Mapping[str, Any], typed: bool = False) -> Hashable:
    """A key for a call. The order of named arguments does not matter; ``typed`` keeps ``1`` and ``1.0`` apart."""
    key = (tuple(positional), tuple(sorted(named.items())))
    if not typed:
        return key
    types = tuple(type(value) for value in positional) + tuple(type(value) for _, value in sorted(named.items()))
    return (*key, types)


def memoize(cache: Cache, typed: bool = False) -> Callable[[Wrapped], Wrapped]:
    """Keep results in ``cache``. Functions may share a cache: each has its own keys. Exceptions are not kept.

    The wrapped function gets ``forget(*args, **kwargs)``, which drops the result of one call and says whether there was one.
    """

    def decorate(function: Wrapped) -> Wrapped:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            key = (function, make_key(args, kwargs, typed))
            return cache.get_or_create(key, lambda: function(*args, **kwargs))

        def forget(*args: Any, **kwargs: Any) -> bool:
            return cache.remove((function, make_key(args, kwargs, typed)))

        wrapper.forget = forget  # type: ignore[attr-defined]
        return wrapper  # type: ignore[return-value]

    return decorate
