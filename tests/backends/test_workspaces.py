"""What every backend promises about workspaces: their limits, layers that come and go, snapshots, and the network."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from typing import Any

import pytest

from backends import Layer, Slot, SlotLostError, Snapshot, SnapshotError, ToolBackend


async def bash(backend: ToolBackend, slot: Slot, command: str) -> str:
    result = await backend.execute(slot, "bash", {"command": command}, timeout_s=60)
    assert result.success, result
    return str(result.output)


def recipe(backend: ToolBackend, command: str, *, base: Layer | None = None, builds: Counter[str] | None = None) -> Layer:
    """A layer that a command makes; its builds are counted."""
    name = f"layer-{uuid.uuid4().hex}"

    async def build(slot: Slot) -> None:
        if builds is not None:
            builds[name] += 1
        await bash(backend, slot, command)

    return Layer(name, build, base=base)


async def test_a_full_workspace_is_data(provider: Any) -> None:
    async with provider.make(slots=2, workspace_bytes=8 << 20, workspace_inodes=300) as backend:
        layer = recipe(backend, "head -c 20M /dev/zero > large; mkdir many; cd many; seq 400 | xargs touch")
        async with backend.slot("one", layer=layer) as slot:
            result = await backend.execute(slot, "bash", {"command": "head -c 20M /dev/zero > more"})
            assert "No space left on device" in result.output
            assert not (await backend.execute(slot, "write_file", {"path": "file", "content": "x" * 10_000})).success
            await bash(backend, slot, "rm more; echo fits > file")
            result = await backend.execute(slot, "bash", {"command": "for n in $(seq 400); do echo > file$n || exit 3; done"})
            assert (result.success, result.metadata["exit_code"]) == (False, 3)
            assert "No space left on device" in result.output
            assert await bash(backend, slot, "rm file*; echo fits > file; wc -c < large; ls many | wc -l") == "20971520\n400\n"


async def test_layers_upon_layers(provider: Any) -> None:
    async with provider.make(slots=2) as backend:
        base = recipe(backend, "mkdir -p kept gone replaced; echo base | tee kept/file gone/file replaced/old single")
        derived = recipe(backend, "rm -r gone replaced single; mkdir replaced; echo new > replaced/new", base=base)
        for layer, files in (
            (derived, "./kept/file\n./replaced/new\n"),
            (base, "./gone/file\n./kept/file\n./replaced/old\n./single\n"),
            (derived, "./kept/file\n./replaced/new\n"),
        ):
            async with backend.slot("one", layer=layer) as one, backend.slot("two", layer=layer) as two:
                for slot in (one, two):
                    assert await bash(backend, slot, "find . -type f | sort") == files
                    assert await bash(backend, slot, "find . ! -user $(id -u)") == ""
                await bash(backend, one, "rm -rf kept; echo spoilt > replaced/new")
                assert await bash(backend, two, "cat kept/file") == "base\n"


async def test_a_repository_in_a_layer_is_trusted_by_git(provider: Any) -> None:
    async with provider.make(slots=3) as backend:
        commit = "git -c user.name=x -c user.email=x@y commit -qm x"
        layer = recipe(backend, f"git init -q repo && cd repo && echo 1 > file && git add . && {commit}")
        slots = [await backend.acquire("group", layer=layer) for _ in range(3)]
        for slot in slots:
            assert (
                await bash(backend, slot, "cd repo; git status --porcelain; echo 2 >> file; git diff --stat | wc -l") == "2\n"
            )


@pytest.mark.any_user
async def test_layers_without_room_are_built_again(provider: Any) -> None:
    """Room for two of six layers, upon a base each, wanted by eight at a time."""
    builds: Counter[str] = Counter()
    async with provider.make(slots=4, layer_bytes=5 << 20) as backend:
        layers = []
        for number in range(6):
            base = recipe(backend, f"head -c 1M /dev/urandom > base; echo {number} > number", builds=builds)
            layers.append(recipe(backend, "head -c 1M /dev/urandom > top", base=base, builds=builds))

        async def use(number: int) -> None:
            for turn in range(3):
                kind = (number + turn) % len(layers)
                async with backend.slot(f"user-{number}", layer=layers[kind]) as slot:
                    assert await bash(backend, slot, "cat base top | wc -c; cat number") == f"{2 << 20}\n{kind}\n"
                    await backend.reset(slot, layer=layers[kind])
                    assert await bash(backend, slot, "cat number") == f"{kind}\n"

        await asyncio.gather(*(use(number) for number in range(8)))
        assert sum(builds.values()) > 12, "some were evicted"
        assert set(builds) == {layer.name for layer in layers} | {layer.base.name for layer in layers if layer.base}
        assert backend.get_stats().slots_in_use == 0


async def test_a_snapshot_forks_a_slot(provider: Any) -> None:
    async with provider.make(slots=3) as backend:
        layer = recipe(backend, "mkdir d; echo layer | tee d/file deleted")
        async with backend.slot("trunk", layer=layer) as trunk:
            await bash(backend, trunk, "rm deleted; echo trunk > own")
            snapshot = await backend.snapshot(trunk)
            assert await bash(backend, trunk, "cat own; echo later > own; rm -r d") == "trunk\n"
            async with backend.slot("fork", start_from=snapshot) as fork, backend.slot("other", start_from=snapshot) as other:
                assert fork.sandbox_id == trunk.sandbox_id
                for slot in (fork, other):
                    assert (
                        await bash(backend, slot, "find . -type f | sort; cat own d/file") == "./d/file\n./own\ntrunk\nlayer\n"
                    )
                    await bash(backend, slot, "echo fork > own")
                assert await bash(backend, trunk, "ls; cat own") == "own\nlater\n"
                nested = await backend.snapshot(fork)
            # Deleting one leaves those that stand on it alone.
            await backend.discard(snapshot)
            await backend.discard(snapshot)
            await backend.reset(trunk, start_from=nested)
            assert await bash(backend, trunk, "cat own d/file") == "fork\nlayer\n"
            with pytest.raises(SnapshotError, match="gone"):
                await backend.reset(trunk, start_from=snapshot)
            assert await bash(backend, trunk, "cat own") == "fork\n"
        with pytest.raises(SnapshotError, match="gone"):
            await backend.acquire("late", start_from=snapshot)
        with pytest.raises(ValueError, match="not from both"):
            await backend.acquire("both", start_from=nested, layer=layer)
        await backend.discard(nested)
        assert backend.get_stats().slots_in_use == 0


async def test_a_snapshot_waits_for_calls_and_not_for_other_slots(provider: Any) -> None:
    async with provider.make(slots=2) as backend, backend.slot("one") as one, backend.slot("two") as two:
        # Whatever a call takes on this machine at this moment, a slow one takes several times as long.
        start = asyncio.get_running_loop().time()
        await bash(backend, two, "true")
        pause = 1 + 10 * (asyncio.get_running_loop().time() - start)
        slow = asyncio.create_task(bash(backend, one, f"echo half > file; sleep {pause}; echo whole > file"))
        for _ in range(1000):
            if (await backend.list_artifacts(one)).entries:
                break
        taken = asyncio.create_task(backend.snapshot(one))
        await bash(backend, two, "true")
        assert not taken.done()
        snapshot = await taken
        await slow
        await backend.reset(two, start_from=snapshot)
        assert await bash(backend, two, "cat file") == "whole\n"


async def test_a_snapshot_without_room_is_refused_and_harms_nobody(provider: Any) -> None:
    async with provider.make(slots=2, layer_bytes=2 << 20) as backend, backend.slot("one") as slot:
        await bash(backend, slot, "head -c 3M /dev/urandom > file")
        with pytest.raises(SnapshotError, match="no room"):
            await backend.snapshot(slot)
        assert await bash(backend, slot, "wc -c < file") == f"{3 << 20}\n"
        await bash(backend, slot, "head -c 1M /dev/urandom > file")
        await backend.reset(slot, start_from=await backend.snapshot(slot))
        assert await bash(backend, slot, "wc -c < file") == f"{1 << 20}\n"


@pytest.mark.any_user
async def test_a_snapshot_dies_with_its_sandbox(provider: Any) -> None:
    async with provider.make(slots=1) as backend:
        async with backend.slot("one") as slot:
            snapshot = await backend.snapshot(slot)
            waiting = asyncio.create_task(backend.acquire("fork", start_from=snapshot))
            await asyncio.sleep(0.1)
            provider.kill()
            with pytest.raises(SnapshotError, match="gone"):
                await waiting
            with pytest.raises(SlotLostError):
                await backend.snapshot(slot)
        await backend.discard(snapshot)
        async with backend.slot("two") as slot:
            with pytest.raises(SnapshotError):
                await backend.reset(slot, start_from=snapshot)
        with pytest.raises(SnapshotError):
            await backend.acquire("late", start_from=Snapshot("nowhere", "snapshot"))


async def test_a_task_may_have_no_network(provider: Any) -> None:
    # What leads out of a slot is a proxy that its environment names.
    has_network = 'test -n "$https_proxy" && echo yes || echo no'
    async with provider.make(slots=1, allow_network=True) as backend:
        for network, expected in ((None, "yes"), (False, "no"), (True, "yes"), (False, "no"), (None, "yes")):
            async with backend.slot("task", network=network) as slot:
                assert await bash(backend, slot, has_network) == f"{expected}\n"
                await backend.reset(slot, network=False)
                assert await bash(backend, slot, has_network) == "no\n"
                await backend.reset(slot)
                assert await bash(backend, slot, has_network) == f"{expected}\n"
