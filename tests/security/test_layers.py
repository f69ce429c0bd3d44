"""Attacks on layers, which trajectories share, and on their names."""

from __future__ import annotations

import asyncio
import secrets

from tests.sandbox_image.running import Api, begins
from tests.security.attack import Attack
from tests.security.field import Field
from tests.security.sites import Outside
from tests.security.table import still_works

TAMPER = (
    "echo spoiled >> data; echo spoiled > new; rm -f gone; chmod 777 kept; mv moved away; ln -f data hard; "
    "truncate -s 0 emptied; mkdir d/more; rm -rf replaced; ln -s /etc/passwd replaced; touch -d 2001-01-01 kept; "
    "echo x > .hidden; rm -rf d/inner"
)
MAKE = (
    "for f in data gone kept moved emptied replaced; do echo original > $f; done; mkdir -p d/inner; "
    "echo original > d/inner/file; chmod 600 kept"
)
STATE = (
    "find . -mindepth 1 | sort | xargs ls -ld --time-style=+ | cut -d' ' -f1,5-; "
    "cat data kept moved emptied replaced d/inner/file"
)


async def test_tampering_with_a_layer(field: Field) -> None:
    """A trajectory changes what it likes in its workspace; the next one starts from the layer as it was frozen."""
    attack = Attack("", "", f"{MAKE}; {STATE}; echo; {TAMPER}; {STATE} 2>&1", Outside())
    before, _, after = (await attack.control.strike(attack, field)).text.partition("\n\n")
    assert before != after
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        await api.output(MAKE)
        name = f"layer-{secrets.token_hex(4)}"
        assert (await api.post("/layers", {"slot_id": "slot_0", "name": name}))[0] == 200
        await api.reset(layer=name)
        pristine = await api.output(STATE)
        for slot in ("slot_0", "slot_1", "slot_0"):
            api.slot = slot
            await api.reset(layer=name)
            assert await api.output(STATE) == pristine
            await api.bash(TAMPER)
            assert (await api.bash(STATE))["output"] != pristine
    await still_works(field)


NAMES = ["..", ".", "a/b", "/etc", "", "a\nb", "a\0b", "x" * 129, "\ud800", "ä", "a b"]


async def test_names_that_lead_elsewhere(field: Field) -> None:
    """The name of a layer is a name and not a path."""
    other = "../slots/slot_1/front/workspace"
    # The control: joined to the directory of layers, this would be the other slot's workspace.
    assert (field.server.data / "layers" / other).exists()
    api = Api.over(field.server)
    async with api.session:
        for name in (other, *NAMES):
            status, answer = await api.post("/layers", {"slot_id": "slot_0", "name": name})
            assert (status, answer["kind"]) == (400, "bad_request"), name
            status, answer = await api.post("/reset", {"slot_id": "slot_0", "layer": name})
            assert status in (400, 404), name
    await still_works(field)


async def test_a_layer_full_of_traps(field: Field) -> None:
    """Links and odd files in a layer lead nobody out who freezes it, starts from it or looks at it."""
    traps = (
        f"ln -s {field.grounds} out; ln -s {field.grounds}/secret secret; mkfifo fifo; "
        "cp /bin/true program; chmod 6755 program; ln -s loop loop; mkdir -p d; ln d/../program hard; truncate -s 100M sparse"
    )
    # The control: who follows links while copying takes the secret along.
    script = f"mkdir from; cd from; {traps}; cd ..; cp -rL from/secret to; cat to"
    attack = Attack("", "", script, Outside())
    assert field.flag in (await attack.control.strike(attack, field)).text
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        await api.bash(traps)
        name = f"layer-{secrets.token_hex(4)}"
        status, answer = await api.post("/layers", {"slot_id": "slot_0", "name": name})
        assert status == 200, answer
        await api.reset(layer=name)
        assert field.flag not in (await api.bash("cat secret out/secret; ls out"))["output"]
        for path in ("secret", "out/secret"):
            assert (await api.post("/artifacts/read", {"slot_id": "slot_0", "path": path}))[0] == 403
        # A program with the rights of its owner gives nobody the rights of the server.
        owner = await api.output("stat -c %u program; id -u")
        assert len(set(owner.split())) == 1
    await still_works(field)


async def test_a_frozen_slot_keeps_nothing(field: Field) -> None:
    """Who made a layer has no hand in it any more: no open file, no process."""
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        hold = "exec 3> data; (while :; do echo spoiled >&3; touch begun; sleep 0.01; done) & wait"
        running = asyncio.create_task(
            api.post("/execute", {"slot_id": "slot_0", "tool": "bash", "args": {"command": hold}, "timeout": 0.3})
        )
        assert await begins(api)
        name = f"layer-{secrets.token_hex(4)}"
        assert (await api.post("/layers", {"slot_id": "slot_0", "name": name}))[0] == 200
        await running
        await api.reset(layer=name)
        size = await api.output("stat -c %s data")
        assert int(size) > 0
        await asyncio.sleep(0.2)
        await api.reset(layer=name)
        assert await api.output("stat -c %s data") == size
