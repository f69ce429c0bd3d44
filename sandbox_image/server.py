"""The slot server: tools in sandboxed slots over HTTP.

    python -m sandbox_image.server --host H --port P --slots N --data-dir D [--token-file F] [--unix-socket S]
                                   [--read-only PATH ...] [--isolation bubblewrap|none] [--die-with-parent]
                                   [--memory-bytes N] [--processes N] [--require DEFENCE ...]
                                   [--network-allow HOST[:PORT] ...]

Routes and messages are those of `sandbox_image.protocol`. When it listens it prints one line of JSON,
`{"ready": true, "port": P, "unix_socket": S, "version": V}`. If it cannot run it prints one line with the reason on standard
error and ends with status 1. It stops on SIGTERM and SIGINT, and with `--die-with-parent` when its standard input ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import stat
import sys
from collections.abc import Iterable

from aiohttp import web

from sandbox_image.box.blueprint import Blueprint, SlotDirectory
from sandbox_image.box.boxes import Boxes
from sandbox_image.box.defences import BUBBLEWRAP_REMEDY, DISK, check_required
from sandbox_image.box.network import NetworkPolicy
from sandbox_image.errors import BoxError, MissingDefenceError, SlotServerError, StartupError
from sandbox_image.kernel.cgroups import ControlGroups, GroupLimits, Hierarchy
from sandbox_image.options import Options
from sandbox_image.protocol import VERSION
from sandbox_image.slot_server import SlotServer
from sandbox_image.slots import HostedSlot
from sandbox_image.storage.datadir import DataDir
from sandbox_image.storage.storage import Storage

# Each call has a connection of its own, and a unix socket refuses connections when its queue is full.
_BACKLOG = 4096
_LOG = logging.getLogger("sandbox_image")


async def _serve(
    options: Options,
    data_dir: DataDir,
    blueprint: Blueprint,
    directories: list[tuple[SlotDirectory, SlotDirectory]],
    storage: Storage,
) -> None:
    stop = _stop_event(options)
    starts = asyncio.Semaphore(os.cpu_count() or 1)
    # Without isolation, processes of the slot could reach the next workspace.
    ahead = storage.mounts and blueprint.isolation != "none"
    slots = {
        f"slot_{index}": HostedSlot(f"slot_{index}", Boxes(blueprint, pair, starts, ahead=ahead), blueprint, storage)
        for index, pair in enumerate(directories)
    }
    server = SlotServer(slots, storage, blueprint, data_dir.path, options.token)
    runner = web.ServerRunner(server.listener(), shutdown_timeout=2.0)
    try:
        check_required({DISK: storage.defence()}, options.required)
        await _start_all(slots.values())
        await runner.setup()
        port = await _listen(runner, options)
        ready = {"ready": True, "port": port, "unix_socket": options.unix_socket, "version": VERSION}
        # Exempts the objects that live as long as the server from garbage collection.
        gc.freeze()
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        for slot in slots.values():
            slot.start_ahead()
        await stop.wait()
    finally:
        for ending in await asyncio.gather(*(slot.close() for slot in slots.values()), return_exceptions=True):
            if ending is not None:
                _LOG.error("%s", ending)
        await runner.cleanup()
        await storage.close()


def _stop_event(options: Options) -> asyncio.Event:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.die_with_parent:

        def on_input() -> None:
            if not os.read(0, 4096):
                loop.remove_reader(0)
                stop.set()

        try:
            loop.add_reader(0, on_input)
        except OSError as error:
            raise StartupError("--die-with-parent needs a pipe as standard input, held open by the parent") from error
    return stop


async def _start_all(slots: Iterable[HostedSlot]) -> None:
    # Not thousands at a time: each box must start within a time limit.
    starts = asyncio.Semaphore(4 * (os.cpu_count() or 1))

    async def start(slot: HostedSlot) -> None:
        async with starts:
            await slot.start()

    endings = await asyncio.gather(*map(start, slots), return_exceptions=True)
    for ending in endings:
        if isinstance(ending, MissingDefenceError):
            raise StartupError(str(ending)) from ending
        if isinstance(ending, BoxError | OSError):
            raise StartupError(f"{ending}. {BUBBLEWRAP_REMEDY}") from ending
        if ending is not None:
            raise ending


async def _listen(runner: web.ServerRunner, options: Options) -> int | None:
    try:
        if options.unix_socket is not None:
            remove_stale_socket(options.unix_socket)
            previous = os.umask(0o177)
            try:
                await web.UnixSite(runner, options.unix_socket, backlog=_BACKLOG).start()
            finally:
                os.umask(previous)
        if options.port is None:
            return None
        await web.TCPSite(runner, options.host, options.port, backlog=_BACKLOG).start()
    except OSError as error:
        raise StartupError(f"cannot listen: {error}") from error
    return int(runner.addresses[-1][1])


def remove_stale_socket(path: str) -> None:
    """Remove the socket that a killed server has left, so that its path can be used again."""
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
        os.unlink(path)


def main() -> int:
    """Run the server until it is stopped; returns the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        options = Options.parse(sys.argv[1:])
        _raise_descriptor_limit()
        data_dir = DataDir.claim(options.data_dir)
        try:
            keep = [options.unix_socket] if options.unix_socket is not None else []
            limits = GroupLimits(options.memory_bytes, options.processes)
            groups = ControlGroups.prepare(Hierarchy.find(), data_dir.groups, limits, options.slots)
            blueprint = Blueprint.prepare(
                options.isolation,
                data_dir.path,
                options.read_only,
                groups,
                keep=keep,
                required=options.required,
                policy=NetworkPolicy(options.network_allowed),
            )
            directories = [blueprint.make_slot(index) for index in range(options.slots)]
            storage = Storage.prepare(data_dir, blueprint, [each for pair in directories for each in pair], options.storage)
            asyncio.run(_serve(options, data_dir, blueprint, directories, storage))
        finally:
            if options.unix_socket is not None:
                remove_stale_socket(options.unix_socket)
            data_dir.release(with_parent=options.die_with_parent)
    except SlotServerError as error:
        sys.stderr.write(f"slot server: {error}\n")
        return 1
    return 0


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
