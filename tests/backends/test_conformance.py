"""What every backend promises, on every backend: cases that share one and leave it as they found it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import tarfile
import uuid
from collections.abc import AsyncIterator, Coroutine, Generator
from typing import Any

import pytest
import pytest_asyncio

from backends import (
    ArtifactForbiddenError,
    ArtifactNotFoundError,
    ArtifactTooLargeError,
    BackendConfigError,
    Layer,
    SandboxProtocolError,
    Slot,
    SlotLostError,
    ToolBackend,
)
from sandbox_image.protocol import MAX_OUTPUT_BYTES, ExecutionResult

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def slot(backend: ToolBackend) -> AsyncIterator[Slot]:
    async with backend.slot("trajectory") as slot:
        yield slot


async def bash(backend: ToolBackend, slot: Slot, command: str, *, timeout_s: float | None = None) -> ExecutionResult:
    return await backend.execute(slot, "bash", {"command": command}, timeout_s=timeout_s)


async def settled(backend: ToolBackend) -> None:
    """Wait until all slots are free; fails if one is lost."""
    assert backend.get_stats().slots_in_use == 0
    slots = await asyncio.gather(*(backend.acquire(f"settled-{number}") for number in range(backend.get_stats().slots)))
    for slot in slots:
        await backend.release(slot)


# Tools


async def test_a_command_runs_in_the_workspace(backend: ToolBackend, slot: Slot) -> None:
    result = await bash(backend, slot, "pwd; echo out; echo err >&2")
    assert (result.success, result.output) == (True, "/workspace\nout\nerr\n")
    assert result.metadata["exit_code"] == 0


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("no-such-program", 127), ("kill -9 $$", 137), ("false", 1)])
async def test_a_command_that_fails_is_data(backend: ToolBackend, slot: Slot, command: str, code: int) -> None:
    result = await bash(backend, slot, command)
    assert (result.success, result.metadata["exit_code"]) == (False, code)


async def test_a_command_that_takes_too_long_is_data(backend: ToolBackend, slot: Slot) -> None:
    result = await bash(backend, slot, "echo before; sleep 1000", timeout_s=0.3)
    assert not result.success
    assert result.metadata["timeout"]
    assert result.output.startswith("before")


async def test_output_is_capped(backend: ToolBackend, slot: Slot) -> None:
    result = await bash(backend, slot, "head -c 3000000 /dev/zero | tr '\\0' x")
    assert result.metadata["truncated"]
    assert result.metadata["output_bytes"] == 3_000_000
    assert len(result.output) <= MAX_OUTPUT_BYTES + 1000


async def test_files_are_written_and_read(backend: ToolBackend, slot: Slot) -> None:
    text = "zwei\nZeilen äöü\n"
    assert (await backend.execute(slot, "write_file", {"path": "a/b.txt", "content": text})).success
    assert (await backend.execute(slot, "read_file", {"path": "a/b.txt"})).output == text
    assert (await bash(backend, slot, "cat a/b.txt")).output == text
    assert not (await backend.execute(slot, "read_file", {"path": "missing"})).success
    assert not (await backend.execute(slot, "read_file", {"path": "/etc/shadow"})).success


async def test_a_malformed_call_is_a_protocol_error(backend: ToolBackend, slot: Slot) -> None:
    with pytest.raises(SandboxProtocolError):
        await backend.execute(slot, "no_such_tool", {})
    with pytest.raises(SandboxProtocolError):
        await backend.execute(slot, "bash", {"command": 3})
    assert (await bash(backend, slot, "echo still here")).success


@pytest.mark.any_user
async def test_results_come_in_request_order(backend: ToolBackend) -> None:
    async with backend.slot("one") as one, backend.slot("two") as two:
        calls = [
            (slot, "bash", {"command": f"sleep {pause}; echo {name}"})
            for slot, pause, name in [(one, 0.3, "a"), (two, 0, "b"), (one, 0.1, "c"), (two, 0.2, "d")]
        ]
        results = await backend.execute_batch(calls)
    assert [result.output for result in results] == ["a\n", "b\n", "c\n", "d\n"]


@pytest.mark.any_user
async def test_a_batch_raises_its_first_failure_as_it_is(backend: ToolBackend) -> None:
    async with backend.slot("one") as one, backend.slot("two") as two:
        with pytest.raises(SandboxProtocolError):
            await backend.execute_batch([(one, "bash", {"command": "sleep 1000"}), (two, "no_such_tool", {})])
    assert await backend.execute_batch([]) == []


async def test_a_slow_command_holds_up_nobody(backend: ToolBackend) -> None:
    async with backend.slot("slow") as slow, backend.slot("fast") as fast:
        sleeper = asyncio.create_task(bash(backend, slow, "sleep 1000", timeout_s=2000))
        together = await asyncio.gather(*(bash(backend, fast, "echo fast") for _ in range(20)))
        assert {result.output for result in together} == {"fast\n"}
        assert not sleeper.done()
        sleeper.cancel()


@pytest.mark.any_user
async def test_a_cancelled_call_breaks_no_other(backend: ToolBackend) -> None:
    async with backend.slot("one") as one, backend.slot("two") as two, backend.slot("three") as three:
        pauses = [(one, 0.5), (two, 1000), (three, 0.5)]
        calls = [asyncio.create_task(bash(backend, slot, f"sleep {pause}; echo done")) for slot, pause in pauses]
        await asyncio.sleep(0.2)
        calls[1].cancel()
        assert [result.output for result in await asyncio.gather(calls[0], calls[2])] == ["done\n", "done\n"]
        with pytest.raises(asyncio.CancelledError):
            await calls[1]


# Slots


async def test_a_slot_is_fresh_after_release(backend: ToolBackend) -> None:
    slots = backend.get_stats().slots
    for _ in range(2):
        held = [await backend.acquire(f"holder-{number}") for number in range(slots)]
        assert backend.get_stats().slots_in_use == slots
        for slot in held:
            result = await bash(backend, slot, "ls -A; ls -A /tmp ~; touch mine /tmp/mine ~/mine; (setsid sleep 1000 &) ")
            assert "mine" not in result.output
            await backend.release(slot)
    await settled(backend)


async def test_release_without_reset_still_gives_the_next_one_a_fresh_slot(backend: ToolBackend) -> None:
    for _ in range(2 * backend.get_stats().slots):
        slot = await backend.acquire("trajectory")
        assert (await bash(backend, slot, "ls -A; touch mine")).output == ""
        await backend.release(slot, reset_workspace=False)
    await settled(backend)


@pytest.mark.any_user
async def test_releasing_twice_is_harmless(backend: ToolBackend) -> None:
    slot = await backend.acquire("first")
    await backend.release(slot)
    await backend.release(slot)
    await settled(backend)


@pytest.mark.any_user
async def test_a_released_slot_cannot_be_used(backend: ToolBackend) -> None:
    slot = await backend.acquire("first")
    await backend.release(slot)
    with pytest.raises(SlotLostError):
        await bash(backend, slot, "true")
    with pytest.raises(SlotLostError):
        await backend.read_artifact(slot, "x")
    with pytest.raises(SlotLostError):
        await backend.reset(slot)


async def test_reset_gives_a_new_workspace_and_lease(backend: ToolBackend, slot: Slot) -> None:
    before = slot.lease
    await bash(backend, slot, "touch old")
    await backend.reset(slot)
    assert slot.lease != before
    assert (await bash(backend, slot, "ls -A")).output == ""


async def test_an_expired_lease_is_refused(backend: ToolBackend, slot: Slot) -> None:
    expired = slot.lease
    await backend.reset(slot)
    renewed, slot.lease = slot.lease, expired
    with pytest.raises(SlotLostError):
        await bash(backend, slot, "true")
    with pytest.raises(SlotLostError):
        await backend.list_artifacts(slot)
    slot.lease = renewed
    assert (await bash(backend, slot, "true")).success


async def test_a_slot_comes_back_when_the_block_fails(backend: ToolBackend) -> None:
    with pytest.raises(ZeroDivisionError):
        async with backend.slot("trajectory"):
            raise ZeroDivisionError
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2), backend.slot("trajectory") as slot:
            await bash(backend, slot, "sleep 60")
    await settled(backend)


@pytest.mark.any_user
async def test_waiting_is_first_come_first_served(backend: ToolBackend) -> None:
    held = [await backend.acquire("holder") for _ in range(backend.get_stats().slots)]
    order: list[int] = []

    async def wait(number: int) -> None:
        async with backend.slot(f"waiter-{number}"):
            order.append(number)
            await asyncio.sleep(0.01)

    waiters = []
    for number in range(8):
        waiters.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert (order, backend.get_stats().waiting) == ([], 8)
    await backend.release(held.pop())
    await asyncio.gather(*waiters)
    assert order == list(range(8))
    for slot in held:
        await backend.release(slot)
    await settled(backend)


# Isolation


async def test_no_network(backend: ToolBackend, slot: Slot) -> None:
    result = await bash(backend, slot, "tail -n +3 /proc/net/dev | cut -d: -f1")
    assert result.output.split() == ["lo"]


async def test_a_slot_sees_no_other(backend: ToolBackend) -> None:
    secret = uuid.uuid4().hex
    async with backend.slot("one") as one, backend.slot("two") as two:
        await bash(backend, one, f"echo {secret} > /workspace/secret; echo {secret} > /tmp/secret; chmod -R 777 /workspace")
        sleeper = asyncio.create_task(bash(backend, one, f"sleep 2 # {secret}"))
        await asyncio.sleep(0.2)
        # The pattern is split so that the searching command does not find itself.
        pattern = f"{secret[:16]}''{secret[16:]}"
        found = await bash(
            backend, two, f"grep -rsl {pattern} /workspace /tmp /home /var/tmp /dev/shm; ls -d /proc/[0-9]* | wc -l"
        )
        await sleeper
    (running,) = found.output.split()
    assert int(running) < 10


async def test_nothing_survives_a_call(backend: ToolBackend, slot: Slot) -> None:
    await bash(backend, slot, "(setsid sh -c 'while :; do date >> heartbeat; sleep 0.05; done' &) ; sleep 0.2")
    before = (await bash(backend, slot, "wc -c < heartbeat")).output
    await asyncio.sleep(0.3)
    assert (await bash(backend, slot, "wc -c < heartbeat")).output == before


# Limits of a task

HUNGRY, FED = "head -c 300M /dev/zero | tail -c 200M | wc -c", f"{200 << 20}\n"
"""A command one process of which holds 200 MiB, and what it prints if it can."""


async def test_a_task_may_have_less_memory(backend: ToolBackend) -> None:
    async with backend.slot("small", memory_bytes=100 << 20) as slot:
        for _ in range(2):
            result = await bash(backend, slot, HUNGRY)
            assert result.output != FED
            # Where slots have control groups; elsewhere each process is limited.
            assert result.metadata.get("oom_killed", True)
            assert (await bash(backend, slot, "echo fine")).output == "fine\n"
            await backend.reset(slot)
        # A reset may ask for something else.
        await backend.reset(slot, memory_bytes=1 << 30)
        assert (await bash(backend, slot, HUNGRY)).output == FED
    # Whoever comes next has as much as ever, in every slot.
    slots = await asyncio.gather(*(backend.acquire(f"next-{number}") for number in range(backend.get_stats().slots)))
    for slot in slots:
        assert (await bash(backend, slot, HUNGRY)).output == FED
        await backend.release(slot)
    await settled(backend)


async def test_all_processes_of_a_task_share_its_memory(backend: ToolBackend) -> None:
    async with backend.slot("small", memory_bytes=256 << 20) as slot:
        together = "for n in 1 2 3; do (head -c 150M /dev/zero | tail -c 120M | (sleep 1; wc -c)) & done; wait"
        result = await bash(backend, slot, together)
        if "oom_killed" not in result.metadata:
            pytest.skip("slots have no control groups here: each process is limited alone")
        assert result.metadata["oom_killed"]


async def test_files_of_a_task_never_use_up_its_memory(backend: ToolBackend) -> None:
    async with backend.slot("small", memory_bytes=100 << 20) as slot:
        result = await bash(backend, slot, "for path in /tmp/file file; do head -c 300M /dev/zero > $path; done")
        if "oom_killed" not in result.metadata:
            pytest.skip("slots have no control groups here: files do not count as memory")
        assert (result.output.count("No space left"), result.metadata["oom_killed"]) == (2, False)
        assert (await bash(backend, slot, "echo fine")).output == "fine\n"
        # With all that is in its files, there is room for the next limit.
        await backend.reset(slot, memory_bytes=80 << 20)
        assert (await bash(backend, slot, "ls -A; ls -A /tmp; echo fine")).output == "fine\n"


async def test_a_layer_is_built_with_all_the_memory(backend: ToolBackend) -> None:
    async def build(slot: Slot) -> None:
        assert (await bash(backend, slot, f"{HUNGRY} > built")).success

    layer = Layer(f"layer-{uuid.uuid4().hex}", build)
    async with backend.slot("small", layer=layer, memory_bytes=100 << 20) as slot:
        assert (await bash(backend, slot, "cat built")).output == FED
        assert (await bash(backend, slot, HUNGRY)).output != FED


@pytest.mark.any_user
async def test_what_no_slot_can_have_is_refused(backend: ToolBackend, slot: Slot) -> None:
    for network, memory_bytes in ((True, None), (None, 1 << 20), (None, 0), (None, -1)):
        with pytest.raises(BackendConfigError):
            await backend.acquire("demanding", network=network, memory_bytes=memory_bytes)
        with pytest.raises(BackendConfigError):
            await backend.reset(slot, network=network, memory_bytes=memory_bytes)
    assert (await bash(backend, slot, "echo fine")).output == "fine\n"
    async with backend.slot("modest", network=False, memory_bytes=1 << 50) as other:
        assert (await bash(backend, other, "echo fine")).output == "fine\n"


# Artifacts


async def test_artifacts(backend: ToolBackend, slot: Slot) -> None:
    await bash(backend, slot, "mkdir -p d/e; printf 'h\\303\\244' > d/text; printf '\\000\\377' > d/e/bytes; ln -s text d/link")
    text = await backend.read_artifact(slot, "d/text", include_sha256=True)
    assert (text.content, text.size, text.sha256) == ("hä", 3, hashlib.sha256("hä".encode()).hexdigest())
    binary = await backend.read_artifact(slot, "d/e/bytes", encoding="base64")
    assert base64.b64decode(binary.content) == b"\0\xff"
    flat = await backend.list_artifacts(slot, "d")
    assert [(entry["path"].split("/")[-1], entry["type"]) for entry in flat.entries] == [
        ("e", "directory"),
        ("link", "symlink"),
        ("text", "file"),
    ]
    assert len((await backend.list_artifacts(slot, ".", recursive=True)).entries) == 5
    assert (await backend.list_artifacts(slot, ".", recursive=True, max_entries=2)).truncated
    archive = await backend.archive_artifacts(slot, "d")
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive.content))) as tar:
        assert {member.name.split("/")[-1] for member in tar.getmembers() if member.isfile()} == {"text", "bytes"}


async def test_artifacts_that_cannot_be_served(backend: ToolBackend, slot: Slot) -> None:
    await bash(backend, slot, "ln -s /etc/passwd out; mkfifo pipe; head -c 1000 /dev/zero > big; mkdir dir")
    with pytest.raises(ArtifactNotFoundError):
        await backend.read_artifact(slot, "missing")
    for path in ("out", "pipe", "dir", "../x", "/etc/passwd"):
        with pytest.raises(ArtifactForbiddenError):
            await backend.read_artifact(slot, path)
    with pytest.raises(ArtifactTooLargeError):
        await backend.read_artifact(slot, "big", max_bytes=999)
    with pytest.raises(ArtifactTooLargeError):
        await backend.archive_artifacts(slot, ".", max_entries=1)
    with pytest.raises(ArtifactNotFoundError):
        await backend.list_artifacts(slot, "missing")


# Layers


class Recipe:
    """A layer whose builds are counted; the first ones fail or hang as often as it is told to."""

    def __init__(self, backend: ToolBackend, *, failures: int = 0, hangs: int = 0) -> None:
        self._backend = backend
        self._failures = failures
        self._hangs = hangs
        self.builds = 0
        self.started = asyncio.Event()
        self.layer = Layer(f"layer-{uuid.uuid4().hex}", self._build)

    async def _build(self, slot: Slot) -> None:
        self.builds += 1
        self.started.set()
        result = await self._backend.execute(slot, "bash", {"command": "mkdir src; echo built > src/file; sleep 0.05"})
        assert result.success
        if self.builds <= self._hangs:
            await asyncio.sleep(60)
        if self.builds <= self._failures:
            raise ValueError(f"build {self.builds} failed")


async def test_a_layer_is_built_once_for_many(backend: ToolBackend) -> None:
    recipe = Recipe(backend)

    async def use() -> None:
        async with backend.slot("trajectory", layer=recipe.layer) as slot:
            result = await bash(backend, slot, "cat src/file; ls -A | wc -l; echo changed > src/file; touch more")
            assert result.output == "built\n1\n"

    await asyncio.gather(*(use() for _ in range(8)))
    assert recipe.builds == 1
    async with backend.slot("trajectory") as slot:
        assert (await bash(backend, slot, "ls -A")).output == ""
        await backend.reset(slot, layer=recipe.layer)
        assert (await bash(backend, slot, "cat src/file")).output == "built\n"
        await backend.reset(slot)
        assert (await bash(backend, slot, "ls -A")).output == ""
    assert recipe.builds == 1
    await settled(backend)


@pytest.mark.any_user
async def test_a_failed_build_is_raised_to_all_and_not_kept(backend: ToolBackend) -> None:
    recipe = Recipe(backend, failures=1)
    slots = backend.get_stats().slots
    await settled(backend)
    acquiring = [asyncio.create_task(backend.acquire("many", layer=recipe.layer)) for _ in range(slots)]
    outcomes = await asyncio.gather(*acquiring, return_exceptions=True)
    failed = [outcome for outcome in outcomes if not isinstance(outcome, Slot)]
    assert [str(outcome) for outcome in failed] == ["build 1 failed"] * slots
    async with backend.slot("again", layer=recipe.layer) as slot:
        assert (await bash(backend, slot, "cat src/file")).output == "built\n"
    assert recipe.builds == 2
    await settled(backend)


@pytest.mark.any_user
async def test_a_cancelled_builder_hands_over(backend: ToolBackend) -> None:
    recipe = Recipe(backend, hangs=1)
    builder = asyncio.create_task(backend.acquire("builder", layer=recipe.layer))
    await recipe.started.wait()
    others = [asyncio.create_task(backend.acquire(f"other-{number}", layer=recipe.layer)) for number in range(2)]
    await asyncio.sleep(0.3)
    builder.cancel()
    for slot in await asyncio.gather(*others):
        assert (await bash(backend, slot, "cat src/file")).output == "built\n"
        await backend.release(slot)
    assert recipe.builds == 2
    await settled(backend)


async def test_a_layer_does_not_change(backend: ToolBackend) -> None:
    recipe = Recipe(backend)
    async with backend.slot("one", layer=recipe.layer) as slot:
        await bash(backend, slot, "rm -rf src; echo poison > file")
    async with backend.slot("two", layer=recipe.layer) as slot:
        assert (await bash(backend, slot, "find . -type f")).output == "./src/file\n"


# Cancellation


class CancelledAt(Coroutine[Any, Any, None]):
    """Some work whose task is cancelled when it suspends for the `moment`th time; `reached` tells whether it did."""

    def __init__(self, work: Coroutine[Any, Any, None], moment: int) -> None:
        self._work = work
        self._left = moment
        self.reached = False

    def send(self, value: Any) -> Any:
        suspension = self._work.send(value)
        if self._left == 0:
            self.reached = True
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        self._left -= 1
        return suspension

    def throw(self, *error: Any) -> Any:
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, None]:
        return self._work.__await__()


async def trajectory(backend: ToolBackend, layer: Layer | None) -> None:
    async with backend.slot("cancelled", layer=layer) as slot:
        await bash(backend, slot, "true")
        await backend.reset(slot, layer=layer)
        await backend.list_artifacts(slot)


@pytest.mark.parametrize("layered", [False, True])
async def test_cancellation_at_every_await_loses_no_slot(backend: ToolBackend, layered: bool) -> None:
    moment = 0
    while True:
        work = CancelledAt(trajectory(backend, Recipe(backend).layer if layered else None), moment)
        (outcome,) = await asyncio.gather(asyncio.create_task(work), return_exceptions=True)
        assert backend.get_stats().slots_in_use == 0
        if not work.reached:
            assert outcome is None
            break
        assert isinstance(outcome, asyncio.CancelledError)
        moment += 1
    assert moment >= (9 if layered else 4)
    await settled(backend)


@pytest.mark.any_user
@pytest.mark.parametrize("turns", range(0, 40, 4))
async def test_cancellation_while_waiting_loses_no_slot(backend: ToolBackend, turns: int) -> None:
    held = [await backend.acquire("holder") for _ in range(backend.get_stats().slots)]
    waiters = [asyncio.create_task(backend.acquire("waiter")) for _ in range(3)]
    await asyncio.sleep(0)
    for slot in held:
        await backend.release(slot, reset_workspace=turns % 2 == 0)
    for _ in range(turns):
        await asyncio.sleep(0)
    for waiter in waiters:
        waiter.cancel()
    for outcome in await asyncio.gather(*waiters, return_exceptions=True):
        if isinstance(outcome, Slot):
            await backend.release(outcome)
    assert (backend.get_stats().waiting, backend.get_stats().slots_in_use) == (0, 0)
    await settled(backend)
