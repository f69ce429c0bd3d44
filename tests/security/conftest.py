"""The fields on which the attacks of a file take place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.security.field import USERS, Field, field_of

if shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=USERS)
def field(request: pytest.FixtureRequest) -> Iterator[Field]:
    """A server as whoever runs the tests and, if that is root, as an ordinary user as well."""
    with field_of(other_user=request.param == USERS[1]) as field:
        yield field
