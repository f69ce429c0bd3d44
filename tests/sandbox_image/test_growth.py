"""Whatever a model or a run can make long is handled in linear time, and does not stop the event loop."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox_image import pieces
from sandbox_image.box.blueprint import SlotDirectory
from sandbox_image.box.network import NetworkPolicy
from sandbox_image.box.proxy import MAX_ADDRESSES, BoxProxy
from sandbox_image.errors import RequestError, ToolError
from sandbox_image.execution_log import ExecutionLog
from sandbox_image.kernel.cgroups import SlotGroup
from sandbox_image.protocol import ErrorKind, ExecutionResult
from sandbox_image.storage.layers import Layers
from sandbox_image.storage.workspace_files import WorkspaceFiles
from sandbox_image.tools.named_pipe import NamedPipe
from sandbox_image.tools.recording import Recording
from sandbox_image.tools.shell import OutputBuffer, variables_of
from sandbox_image.tools.tmux_control import ControlClient, LineReader
from tests.sandbox_image.running import Api, running
from tests.support.growth import MOST, growth, slowest

Work = Callable[[], object]


def recording_of(count: int) -> Recording:
    recording = Recording()
    recording.start(80, 24, "tmux")
    for _ in range(count):
        recording.output(b"x")
    return recording


def read_recording(count: int) -> Work:
    recording = recording_of(count)
    return lambda: recording.next_lines(1_000_000, from_start=True)


def read_recording_line_by_line(count: int) -> Work:
    recording = recording_of(count)
    return lambda: [recording.next_lines(1, from_start=False) for _ in range(count)]


def write_output(count: int) -> Work:
    buffer = OutputBuffer(1000)
    return lambda: [buffer.write(b"0123456789") for _ in range(count)]


def encode_a_listing(count: int) -> Work:
    entries = [{"path": f"directory/{number}", "type": "file", "size": 1, "mode": 420} for number in range(count)]
    return lambda: pieces.encode_json({"entries": entries, "truncated": False})


def encode_a_file(count: int) -> Work:
    content = os.urandom(64 * count)
    return lambda: pieces.encode_json({"content": pieces.encode_base64(content)})


def sort_names(count: int) -> Work:
    names = [os.urandom(8).hex() for _ in range(count)]
    return lambda: pieces.smallest(names, count)


def remember_executions(count: int) -> Work:
    log = ExecutionLog()

    async def result() -> ExecutionResult:
        return ExecutionResult(True, "x" * 1000)

    async def all_of_them() -> None:
        for number in range(count):
            await log.once(("slot", "lease", str(number)), result)

    return lambda: asyncio.run(all_of_them())


class NoTrash:
    """Deletes nothing."""

    def take(self, path: Path) -> None:
        """Leave it."""


def evict_layers(count: int) -> Work:
    layers = Layers(Path("/nowhere"), NoTrash(), count)  # type: ignore[arg-type]
    for number in range(count):
        layers.leave(layers.add(f"layer-{number}", number, None, 1, evictable=True))
    return lambda: layers.make_room(count)


def read_lines(size: int, line: bytes) -> Work:
    """Through a pipe: `size` chunks, each of them a full one."""
    chunk = (line * (65536 // len(line)))[:65536]

    async def all_of_them() -> None:
        read_end, write_end = os.pipe()
        reader = LineReader(read_end, lambda line: None, lambda: None)
        for _ in range(size):
            os.write(write_end, chunk)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        reader.close()
        os.close(write_end)

    return lambda: asyncio.run(all_of_them())


def answer_of_tmux(count: int) -> Work:
    async def one_answer() -> None:
        commands_in, commands = os.pipe()
        events, events_out = os.pipe()
        client = ControlClient(commands, events, lambda chunk: None, lambda width, height: None)
        asked = asyncio.create_task(client.ask_numbers("capture", 1, blocks=2))
        answer = [b"%begin 1 1 1", b"%d" % count, b"%end 1 1 1", b"%begin 1 2 1", *[b"%end 1 2 1"] * count, b"%end 1 2 1", b""]
        text = b"\n".join(answer)
        for start in range(0, len(text), 65536):
            os.write(events_out, text[start : start + 65536])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        _, lines = await asked
        assert len(lines) == count
        client.close()
        for descriptor in (commands_in, events_out):
            os.close(descriptor)

    return lambda: asyncio.run(one_answer())


def read_environment(count: int) -> Work:
    env = {f"{number:x}": "" for number in range(count)}
    return lambda: variables_of(env)


@pytest.mark.parametrize(
    ("prepare", "size"),
    [
        (read_recording, 2000),
        (read_recording_line_by_line, 1000),
        (write_output, 2000),
        (encode_a_listing, 2000),
        (encode_a_file, 10_000),
        (sort_names, 5000),
        (remember_executions, 1000),
        (evict_layers, 500),
        (lambda size: read_lines(size, b"x" * 100 + b"\n"), 2),
        (lambda size: read_lines(size, b"\n"), 1),
        (answer_of_tmux, 2000),
        (read_environment, 1000),
    ],
    ids=[
        *("a recording", "a recording line by line", "output", "a listing", "a file", "names", "executions", "layers"),
        *("lines", "empty lines", "an answer of tmux", "an environment"),
    ],
)
def test_ten_times_as_much_takes_ten_times_as_long(prepare: Callable[[int], Work], size: int) -> None:
    assert growth(prepare, size) < MOST


def test_what_grows_with_the_square_is_noticed() -> None:
    """The control: what the recording once did."""

    def quadratic(count: int) -> Work:
        lines = [b"x"] * count
        return lambda: [sum(map(len, lines[:number])) for number in range(count)]

    assert growth(quadratic, 250) > MOST


def test_a_path_that_goes_up_and_down(tmp_path: Path) -> None:
    """Each `..` begins again at the root."""
    files = WorkspaceFiles(SlotDirectory(tmp_path, tmp_path, None, "/workspace", SlotGroup()))
    (tmp_path / "workspace" / "/".join(["d"] * 250)).mkdir(parents=True)

    def resolve(depth: int) -> Work:
        def work() -> None:
            # That of 250 is refused: it would open 31,000 directories.
            with suppress(OSError), files.directory("d/" * depth + "../" * depth):
                pass

        return work

    with files.directory("d/" * 25 + "../" * 25) as directory:
        assert os.listdir(directory) == ["d"]
    assert growth(resolve, 25) < MOST


async def test_a_pipe_that_is_written_to_without_end_is_not_read_without_end() -> None:
    """What is in it when somebody looks is taken; a writer that is as fast as the reader does not hold up the loop."""
    pipe = NamedPipe(None)
    seen = bytearray()
    pipe.open(seen.extend)
    writer = os.open(f"/proc/self/fd/{pipe.read_end}", os.O_WRONLY)

    def write_more(chunk: bytes) -> None:
        seen.extend(chunk)
        if len(seen) < 1_000_000:
            os.write(writer, b"y" * 4096)

    pipe.open(write_more)
    os.write(writer, b"x" * 60_000)
    pipe.drain()
    assert 60_000 <= len(seen) < 200_000
    os.close(writer)
    pipe.close()


class CountingPolicy(NetworkPolicy):
    """Admits nothing, and counts how often it is asked."""

    asked = 0

    def admits(self, host: str, port: int, address: str) -> bool:
        """No."""
        type(self).asked += 1
        return False


async def test_a_name_with_thousands_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns a name decides how many addresses it has."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    proxy = BoxProxy(CountingPolicy())
    await proxy.serve(listening)
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.0.{number // 256}.{number % 256}", 80)) for number in range(4000)
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"CONNECT many.example:80 HTTP/1.1\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 403")
    writer.close()
    proxy.close()
    assert 0 < CountingPolicy.asked <= MAX_ADDRESSES


def test_an_error_quotes_no_more_than_a_person_reads() -> None:
    message = "\1" * 1_000_000
    assert len(str(RequestError(ErrorKind.BAD_REQUEST, message))) < 50_000
    with pytest.raises(ToolError):
        variables_of({message: "\0"})


def turns_of_others(work: Work) -> int:
    """How often another thread runs while this one works."""
    ended = threading.Event()
    turns = 0

    def count() -> None:
        nonlocal turns
        while not ended.is_set():
            time.sleep(0.0005)
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    before = turns
    work()
    taken = turns - before
    ended.set()
    other.join()
    return taken


LARGE = "x" * 48_000_000
MANY = [{"path": f"{number}", "type": "file", "size": 1, "mode": 420} for number in range(100_000)]
NAMES = [f"{(number * 7919) % 1_000_003}" for number in range(200_000)]


@pytest.mark.parametrize(
    ("in_pieces", "at_once"),
    [
        (lambda: pieces.encode_json({"content": LARGE}), lambda: json.dumps({"content": LARGE})),
        (lambda: pieces.decode_base64(LARGE), lambda: base64.b64decode(LARGE, validate=True)),
        (lambda: pieces.encode_json({"entries": MANY}), lambda: json.dumps({"entries": MANY})),
        (lambda: pieces.smallest(NAMES, len(NAMES)), lambda: sorted(NAMES)),
    ],
    ids=["a long text", "a file", "a long list", "names"],
)
def test_other_threads_run_between_pieces(in_pieces: Work, at_once: Work) -> None:
    """No call of a function in C is interrupted, so that nothing else runs in the control."""
    # A busy machine gives the other thread too few turns, or takes this one its processor away in the control.
    assert max(turns_of_others(in_pieces) for _ in range(3)) > 2 * min(turns_of_others(at_once) for _ in range(3)) + 3


FORGE_EVENTS = """
for process in /proc/[0-9]*; do
    tr '\\0' ' ' <$process/cmdline 2>/dev/null | grep -q '^tmux -u -C' || continue
    python3 -c "
with open('$process/fd/1', 'w') as pipe:
    for _ in range(40):
        pipe.write('%output %0 x\\n' * 1000)
        pipe.flush()
"
done
"""


async def test_a_stream_of_a_long_recording_does_not_stop_other_slots() -> None:
    """A program that prints character by character makes 40,000 events in half a minute; this one writes them where tmux does.

    That is possible where the slots' user is the server's.
    """
    with running(other_user=os.geteuid() == 0) as server:
        api = Api.over(server)
        async with api.session:
            other = Api(api.session, "slot_1")
            await api.tmux("start")
            await api.stateful(FORGE_EVENTS)
            alone = await slowest(lambda: other.output("echo fine"))
            streaming = asyncio.create_task(api.tmux("stream", reset=True, max_bytes=1_000_000))
            beside = await slowest(lambda: other.output("echo fine"), during=streaming)
            assert (await streaming)["metadata"]["events"] > 30_000
            assert beside < 10 * alone + 0.5
