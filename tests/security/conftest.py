"""The fields on which the attacks of a file take place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.security.attack import Attack
from tests.security.field import Field, field_of
from tests.support.users import ORDINARY_USER, USERS, drop, is_superfluous

if shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=USERS)
def field(request: pytest.FixtureRequest) -> Iterator[Field]:
    """A server as whoever runs the tests and, if that is root, as an ordinary user as well."""
    with field_of(other_user=request.param == ORDINARY_USER) as field:
        yield field


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what an ordinary user's server need not be asked again."""
    drop(config, items, lambda item: is_superfluous(item, "field") or _is_for_own_user(item))


def _is_for_own_user(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    attack = parameters.get("attack")
    return isinstance(attack, Attack) and not attack.as_user and parameters.get("field") == ORDINARY_USER
