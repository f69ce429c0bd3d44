"""The fields on which the attacks of a file take place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.security.attack import Attack
from tests.security.field import USERS, Field, field_of

if shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=USERS)
def field(request: pytest.FixtureRequest) -> Iterator[Field]:
    """A server as whoever runs the tests and, if that is root, as an ordinary user as well."""
    with field_of(other_user=request.param == USERS[1]) as field:
        yield field


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what an ordinary user's server need not be asked again."""
    superfluous = [item for item in items if isinstance(item, pytest.Function) and _is_superfluous(item)]
    config.hook.pytest_deselected(items=superfluous)
    items[:] = [item for item in items if item not in superfluous]


def _is_superfluous(item: pytest.Function) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    attack = parameters.get("attack")
    return isinstance(attack, Attack) and not attack.as_user and parameters.get("field") == USERS[1]
