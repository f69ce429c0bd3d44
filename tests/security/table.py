"""Holding a table of attacks against a server."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from tests.sandbox_image.running import Api
from tests.security.attack import Attack, Outcome, Site, fell_over
from tests.security.field import Field
from tests.security.sites import InSlot


def each(attacks: Sequence[Attack]) -> pytest.MarkDecorator:
    """A test for each attack of a table."""
    names = [attack.name for attack in attacks]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("attack", attacks, ids=names)


async def hold(field: Field, attack: Attack, place: Site | None = None) -> Outcome:
    """Make sure that an attack works at its control and fails in a slot, which is as good as before afterwards."""
    if attack.control.needs_root and os.geteuid() != 0:
        pytest.skip("its control needs root")
    field.restore()
    control = await attack.control.strike(attack, field)
    assert attack.succeeded(control), f"the control does not show that this can work: {control}"
    field.restore()
    outcome = await (place or InSlot()).strike(attack, field)
    assert not attack.succeeded(outcome), f"{attack.threat}: {outcome}"
    assert not fell_over(attack, outcome), f"the attack is broken: {outcome}"
    await still_works(field)
    return outcome


async def still_works(field: Field) -> None:
    """Both slots serve, and nobody had to be told about it."""
    api = Api.over(field.server)
    async with api.session:
        for slot in ("slot_0", "slot_1"):
            api.slot = slot
            assert await api.output("echo fine") == "fine\n"
