"""Whose server a test talks to: that of whoever runs the tests and, where that is root, an ordinary user's as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest

OWN_USER, ORDINARY_USER = USERS = ("own user", "ordinary user")


def is_superfluous(item: pytest.Item, fixture: str) -> bool:
    """Whether a test, which is the same for any user, has the ordinary user as the parameter of a fixture.

    A module may be marked `any_user`, and a test in it `both_users`.
    """
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if parameters.get(fixture) != ORDINARY_USER or item.get_closest_marker("both_users") is not None:
        return False
    return item.get_closest_marker("any_user") is not None


def drop(config: pytest.Config, items: list[pytest.Item], superfluous: Callable[[pytest.Item], bool]) -> None:
    """Take tests from a collection."""
    dropped = [item for item in items if superfluous(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
