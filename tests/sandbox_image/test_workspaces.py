"""What workspaces are made of: limits, layers upon each other, snapshots, and room for layers."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sandbox_image.storage.storage import MAX_CHAIN
from tests.sandbox_image.running import Api, RunningServer, becomes, begins, on_overlay, running, without_the_right_to_mount
from tests.support.waiting import PATIENCE_S

Within = Callable[[Path], list[str]]
WAYS: dict[str, tuple[list[str], Within | None, dict[str, str]]] = {
    "in memory": ([], None, {"layers": "overlay", "workspaces": "memory"}),
    "on disk": (["--workspaces-on-disk"], None, {"layers": "overlay", "workspaces": "disk"}),
    "copied in memory": ([], on_overlay, {"layers": "copy", "workspaces": "memory"}),
    "copied on disk": (["--workspaces-on-disk"], on_overlay, {"layers": "copy", "workspaces": "disk"}),
    "without mounts": ([], without_the_right_to_mount, {"layers": "copy", "workspaces": "disk"}),
}
"""Options, how the server is started, and what it says of its workspaces then."""


@contextmanager
def small(*options: str, other_user: bool = False, slots: int = 2) -> Iterator[RunningServer]:
    """A server whose slots have 8 MiB and 300 files each."""
    limits = ["--workspace-bytes", str(8 << 20), "--workspace-inodes", "300"]
    with running(*limits, *options, other_user=other_user, slots=slots) as server:
        yield server


async def freeze(api: Api, name: str, *commands: str, layer: str | None = None, for_layer: bool = True) -> None:
    """Make a layer by commands upon another."""
    await api.reset(layer=layer, for_layer=for_layer)
    for command in commands:
        await api.output(command)
    status, state = await api.post("/layers", {"slot_id": api.slot, "name": name, "lease": api.lease})
    assert status == 200, state


async def layers_become(api: Api, names: list[str]) -> bool:
    """Whether there are these layers soon: a slot leaves one when the box that saw it is dead."""
    for _ in range(int(PATIENCE_S / 0.02)):
        if (await api.get("/layers"))[1]["layers"] == names:
            return True
        await asyncio.sleep(0.02)
    return False


async def require_overlay(api: Api) -> None:
    """Skip the test where layers are copied."""
    limits = (await api.get("/health"))[1]["limits"]
    if limits["layers"] != "overlay":
        pytest.skip(f"no overlays here: {limits['layers_are_copied_because']}")


async def test_a_full_workspace_is_the_commands_problem(server: RunningServer) -> None:
    with small(other_user=_is_other(server)) as limited:
        api = Api.over(limited)
        async with api.session:
            await require_overlay(api)
            limits = (await api.get("/health"))[1]["limits"]
            assert (limits["workspaces"], limits["workspace_bytes"], limits["workspace_inodes"]) == ("memory", 8 << 20, 300)
            result = await api.bash("head -c 20M /dev/zero > big")
            assert "No space left" in result["output"]
            written = await api.tool("write_file", {"path": "more", "content": "x" * 100_000})
            assert (written["success"], written["error"]) == (False, "more: No space left on device")
            other = Api(api.session, "slot_1")
            await other.output("head -c 4M /dev/zero > fits")
            await api.output("rm big; echo x > more")
            result = await api.bash("for n in $(seq 400); do echo > file$n || exit 3; done")
            assert result["metadata"]["exit_code"] == 3
            assert "No space left" in result["output"]
            assert 280 < int(await api.output("ls | wc -l")) < 300
            await api.reset()
            await api.output("head -c 4M /dev/zero > fits")


def _is_other(server: RunningServer) -> bool:
    return os.stat(f"/proc/{server.process.pid}").st_uid != os.geteuid()


BASE = (
    "mkdir -p kept/deep replaced/old gone/deep; echo base | tee kept/file replaced/file gone/deep/file single changed renamed"
)
DERIVED = (
    "rm -r gone single replaced; mkdir replaced; echo derived > replaced/new; echo more >> changed; mv renamed moved;"
    "chmod 640 kept/file"
)
MERGED = "changed base more|kept|kept/deep|kept/file base|moved base|replaced|replaced/new derived|"
SHOW = "find . -mindepth 1 -type d -printf '%P|' -o -type f -printf '%P ' -exec sh -c 'tr \"\\n\" \" \" < {}' \\; -printf '|'"


async def shown(api: Api) -> str:
    """All paths below the workspace, those of files with their content, sorted."""
    entries = (await api.output(SHOW)).split("|")
    return "".join(f"{entry.strip()}|" for entry in sorted(entries) if entry)


@pytest.mark.parametrize(("way", "for_layer"), [*((way, True) for way in WAYS), ("in memory", False)])
async def test_deletions_survive_in_layers_upon_layers(server: RunningServer, way: str, for_layer: bool) -> None:
    options, within, expected = WAYS[way]
    if within is not None and _is_other(server):
        pytest.skip("a matter of root")
    name = secrets.token_hex(4)
    with ExitStack() as stack:
        # "In memory" is what every server does that is not told otherwise.
        own = server
        if options or within is not None:
            own = stack.enter_context(running(*options, other_user=_is_other(server), within=within))
        api = Api.over(own)
        async with api.session:
            limits = (await api.get("/health"))[1]["limits"]
            assert {name: limits[name] for name in expected} == expected
            assert ("layers_are_copied_because" in limits) == (limits["layers"] == "copy")
            assert ("workspaces_are_unlimited_because" in limits) == (limits["workspaces"] == "disk")
            base, derived, top, fork = (f"{name}-{kind}" for kind in ("base", "derived", "top", "fork"))
            await freeze(api, base, BASE, for_layer=for_layer)
            await freeze(api, derived, DERIVED, layer=base, for_layer=for_layer)
            await freeze(api, top, "rm -r kept; mkdir kept; echo top > kept/file", layer=derived, for_layer=for_layer)
            other = Api(api.session, "slot_1")
            for reader in (api, other):
                await reader.reset(layer=derived)
                assert await shown(reader) == MERGED
                assert (
                    await reader.output("stat -c '%a %u' kept/file; id -u | sed 's/^/640 /'")
                    == 2 * f"640 {await uid(reader)}\n"
                )
                # Nothing that a slot does reaches a layer.
                await reader.output("rm -rf kept replaced; echo spoilt | tee changed replaced > moved")
                await reader.reset(layer=top)
                assert await shown(reader) == MERGED.replace("kept/deep|", "").replace("kept/file base", "kept/file top")
                await reader.reset(layer=base)
                assert (await shown(reader)).startswith("changed base|gone|")
            # And a fork of a slot that goes on.
            await other.output("rm -r gone; echo forked > forked")
            assert (await other.post("/layers", {"slot_id": "slot_1", "name": fork, "snapshot": True}))[0] == 200
            await api.reset(layer=fork)
            assert await shown(api) == await shown(other)
            assert await api.output("find . ! -user $(id -u)") == ""


async def uid(api: Api) -> str:
    return (await api.output("id -u")).strip()


async def test_artifacts_show_what_the_box_shows(api: Api) -> None:
    name = secrets.token_hex(4)
    await freeze(api, name, BASE, DERIVED)
    await freeze(api, f"{name}-2", "rm -r kept/deep; echo new > kept/new", layer=name)
    await api.reset(layer=f"{name}-2")
    await api.output("rm -r replaced; echo own > own")
    _, listing = await api.post("/artifacts/list", {"slot_id": api.slot, "recursive": True})
    assert [entry["path"] for entry in listing["entries"]] == ["changed", "kept", "kept/file", "kept/new", "moved", "own"]
    status, content = await api.post("/artifacts/read", {"slot_id": api.slot, "path": "changed"})
    assert (status, content["content"]) == (200, "base\nmore\n")
    status, archive = await api.post("/artifacts/archive", {"slot_id": api.slot})
    assert (status, archive["entries"]) == (200, 6)


async def test_git_trusts_a_repository_in_a_layer(api: Api) -> None:
    name = secrets.token_hex(4)
    commit = "git -c user.name=x -c user.email=x@y commit -qm x"
    await freeze(api, name, f"git init -q repo; cd repo; mkdir d; echo 1 > d/a; echo 2 > b; git add .; {commit}")
    for slot in ("slot_0", "slot_1"):
        reader = Api(api.session, slot)
        await reader.reset(layer=name)
        assert await reader.output("cd repo; git status --porcelain; git log --oneline | wc -l") == "1\n"
        assert await reader.output("cd repo; echo 3 > b; mv d e; git status --porcelain") == " M b\n D d/a\n?? e/\n"


async def test_directories_of_a_layer_can_be_renamed(api: Api, server: RunningServer) -> None:
    name = secrets.token_hex(4)
    await freeze(api, name, "mkdir -p d/e; echo x > d/e/file")
    await api.reset(layer=name)
    assert await api.output("mv d moved; cat moved/e/file; ls") == "x\nmoved\n"
    await api.reset(layer=name)
    renamed = await api.bash("python3 -c \"import os; os.rename('d', 'moved')\"")
    if os.stat(f"/proc/{server.process.pid}").st_uid == 0:
        assert renamed["success"]
    else:
        # The kernel lets only root redirect directories; programs treat it as a move between file systems.
        assert "Invalid cross-device link" in renamed["output"]


async def test_a_file_has_the_device_of_its_directory_and_keeps_its_number(api: Api) -> None:
    await require_overlay(api)
    name = secrets.token_hex(4)
    await freeze(api, name, "mkdir d; echo x > d/file")
    await api.reset(layer=name)
    numbers = await api.output("stat -c %d . d d/file; touch d/new; stat -c %d d/new")
    assert len(set(numbers.split())) == 1
    before = await api.output("stat -c %i d/file")
    assert await api.output("echo more >> d/file; stat -c %i d/file") == before
    assert await api.output("tar --one-file-system -cf - . | tar -t | sort") == "./\n./d/\n./d/file\n./d/new\n"


async def test_snapshots_fork_a_slot_that_goes_on(api: Api) -> None:
    name = secrets.token_hex(4)
    await freeze(api, name, BASE)
    await api.reset(layer=name)
    await api.output(DERIVED)
    status, state = await api.post(
        "/layers", {"slot_id": api.slot, "name": f"{name}-fork", "lease": api.lease, "snapshot": True}
    )
    assert (status, state["lease"], state["layer"]) == (200, api.lease, name)
    assert await shown(api) == MERGED
    await api.output("echo later > later; rm -r kept")
    fork = Api(api.session, "slot_1")
    await fork.reset(layer=f"{name}-fork")
    assert await shown(fork) == MERGED
    await fork.output("echo forked > forked")
    # A snapshot of what started from a snapshot.
    status, _ = await api.post("/layers", {"slot_id": "slot_1", "name": f"{name}-fork2", "snapshot": True})
    await api.reset(layer=f"{name}-fork2")
    assert await shown(api) == MERGED.replace("kept|", "forked forked|kept|", 1)
    status, answer = await api.post("/layers/delete", {"name": f"{name}-fork"})
    assert (status, f"{name}-fork" in answer["layers"]) == (200, False)
    assert (await api.post("/layers/delete", {"name": f"{name}-fork"}))[1]["kind"] == "not_found"
    assert (await api.post("/reset", {"slot_id": "slot_0", "layer": f"{name}-fork"}))[1]["kind"] == "not_found"
    # What stands upon it is not harmed.
    await api.reset(layer=f"{name}-fork2")
    assert await shown(api) == MERGED.replace("kept|", "forked forked|kept|", 1)


async def test_a_snapshot_waits_for_the_running_call(api: Api) -> None:
    name = secrets.token_hex(4)
    call = asyncio.create_task(api.output("echo half > file; touch begun; sleep 0.3; echo whole > file"))
    assert await begins(api)
    status, _ = await api.post("/layers", {"slot_id": api.slot, "name": name, "snapshot": True})
    assert status == 200
    await call
    await api.reset(layer=name)
    assert await api.output("cat file") == "whole\n"


async def test_unreadable_files_are_in_a_snapshot(api: Api) -> None:
    name = secrets.token_hex(4)
    await api.output("mkdir shut; echo x > shut/file; echo y > secret; chmod 0 secret shut")
    status, answer = await api.post("/layers", {"slot_id": api.slot, "name": name, "snapshot": True})
    assert status == 200, answer
    await api.reset(layer=name)
    assert await api.output("stat -c %a shut secret; chmod 700 shut secret; cat shut/file secret") == "0\n0\nx\ny\n"


async def test_many_snapshots_upon_each_other(api: Api) -> None:
    """More than can be mounted at once."""
    name = secrets.token_hex(4)
    await api.output("echo 0 > first")
    for number in range(MAX_CHAIN + 5):
        status, answer = await api.post("/layers", {"slot_id": api.slot, "name": f"{name}-{number}", "snapshot": True})
        assert status == 200, answer
        await api.reset(layer=f"{name}-{number}")
        await api.output(f"echo {number} > last; echo > file{number % 3}; rm -f file{(number + 1) % 3}")
    assert await api.output("cat first last; ls | wc -l") == f"0\n{MAX_CHAIN + 4}\n4\n"


async def test_layers_that_nobody_uses_go_when_there_is_no_room(server: RunningServer) -> None:
    with running("--layer-bytes", str(3 << 20), other_user=_is_other(server)) as own:
        api = Api.over(own)
        async with api.session:
            other = Api(api.session, "slot_1")
            for name in ("a", "b"):
                await freeze(api, name, f"head -c 1M /dev/urandom > {name}")
            await other.reset(layer="a")
            await freeze(api, "c", "head -c 1M /dev/urandom > c")
            assert await layers_become(api, ["a", "c"]), "b was used longest ago"
            assert (await api.post("/reset", {"slot_id": "slot_0", "layer": "b"}))[1]["kind"] == "not_found"
            # Those that are in use stay, and so does what is below them, although there is not enough room.
            await freeze(api, "d", "head -c 1M /dev/urandom > d", layer="c")
            await api.reset(layer="d")
            await freeze(other, "e", "head -c 2M /dev/urandom > e")
            assert await layers_become(api, ["c", "d", "e"])
            assert await api.output("cat c d | wc -c") == f"{2 << 20}\n"
            await other.reset(layer="e")
            await api.reset()
            assert await layers_become(api, ["e"])
            # Snapshots are not evicted, and refused when they do not fit.
            status, failure = await api.post("/layers", {"slot_id": "slot_1", "name": "s", "snapshot": True})
            assert status == 200, failure
            await other.output("head -c 3M /dev/urandom > large")
            status, failure = await api.post("/layers", {"slot_id": "slot_1", "name": "t", "snapshot": True})
            assert (status, failure["kind"]) == (507, "no_room")
            assert await layers_become(api, ["e", "s"])
            assert await other.output("cat e large | wc -c") == f"{5 << 20}\n"
            for slot in (api, other):
                await slot.reset()
            assert await layers_become(api, ["e", "s"])
            await api.post("/layers/delete", {"name": "s"})
            await freeze(api, "f", "head -c 3M /dev/urandom > f")
            assert await layers_become(api, ["f"])
            # Beside it the empty one.
            assert await becomes(lambda: len(os.listdir(own.data / "layers")) == 2)
            assert await becomes(lambda: not os.listdir(own.data / "trash"))
