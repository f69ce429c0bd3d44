"""The slot server's command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sandbox_image.box.blueprint import Isolation
from sandbox_image.box.defences import BASICS, REMEDIES
from sandbox_image.box.network import Destination
from sandbox_image.errors import StartupError
from sandbox_image.protocol import LEAST_MEMORY_BYTES, WORKSPACE_BYTES, WORKSPACE_INODES
from sandbox_image.storage.storage import StorageOptions

LEAST_PROCESSES = 16


@dataclass(frozen=True)
class Options:
    """The command line."""

    host: str
    port: int | None
    slots: int
    data_dir: Path
    token: str | None
    unix_socket: str | None
    read_only: tuple[str, ...]
    isolation: Isolation
    die_with_parent: bool
    memory_bytes: int
    processes: int
    storage: StorageOptions
    required: tuple[str, ...]
    network_allowed: tuple[Destination, ...]

    @classmethod
    def parse(cls, argv: list[str]) -> Options:
        """Read the command line; ends the process with status 2 if it makes no sense.

        Raises:
            StartupError: the token file cannot be read or is empty.
        """
        parser = argparse.ArgumentParser(prog="python -m sandbox_image.server", description="Sandboxed slots over HTTP.")
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, help="0 takes a free one; without it and with --unix-socket there is no TCP")
        parser.add_argument("--slots", type=int, default=1)
        parser.add_argument("--data-dir", type=Path, required=True, help="workspaces and layers; emptied at start and end")
        parser.add_argument("--token-file", type=Path, help="requests must carry the token in it")
        parser.add_argument("--unix-socket", help="listen here, for this user only")
        parser.add_argument("--read-only", action="append", default=[], metavar="PATH", help="show this tree in the boxes")
        parser.add_argument("--isolation", choices=["bubblewrap", "none"], default="bubblewrap")
        parser.add_argument("--die-with-parent", action="store_true", help="stop when standard input ends")
        parser.add_argument("--memory-bytes", type=int, default=4 * 1024**3, help="of a slot, its files in memory included")
        parser.add_argument("--processes", type=int, default=1024, help="of a slot, threads included")
        parser.add_argument(
            "--workspace-bytes", type=int, default=WORKSPACE_BYTES, help="what a slot may write; at most half of its memory"
        )
        parser.add_argument("--workspace-inodes", type=int, default=WORKSPACE_INODES, help="how many files it may make")
        parser.add_argument("--workspaces-on-disk", action="store_true", help="not in memory; their size is not limited then")
        parser.add_argument("--layer-bytes", type=int, help="room for layers; half of the free disk")
        parser.add_argument(
            "--require", action="append", default=[], metavar="DEFENCE", choices=list(REMEDIES), help="stop if it is missing"
        )
        parser.add_argument(
            "--network-allow",
            action="append",
            default=[],
            type=_destination,
            metavar="HOST[:PORT]",
            help="let slots with network reach it, wherever it is",
        )
        given = parser.parse_args(argv)
        if not 1 <= given.slots <= 4096:
            parser.error("--slots must be between 1 and 4096")
        if given.memory_bytes < LEAST_MEMORY_BYTES:
            parser.error(f"--memory-bytes must be at least {LEAST_MEMORY_BYTES}")
        if given.processes < LEAST_PROCESSES:
            parser.error(f"--processes must be at least {LEAST_PROCESSES}")
        if given.port is None and given.unix_socket is None:
            parser.error("give --port, --unix-socket or both")
        # Files in memory count as memory of the slot, and no kill frees them.
        most = given.workspace_bytes if given.workspaces_on_disk else given.memory_bytes // 2
        workspace_bytes = min(given.workspace_bytes, most)
        storage = StorageOptions(workspace_bytes, given.workspace_inodes, given.workspaces_on_disk, given.layer_bytes)
        if min(storage.workspace_bytes, storage.layer_bytes or 1) < 1 or storage.workspace_inodes < 100:
            parser.error("--workspace-bytes and --layer-bytes must be at least 1, --workspace-inodes at least 100")
        return cls(
            host=given.host,
            port=given.port,
            slots=given.slots,
            data_dir=given.data_dir,
            token=None if given.token_file is None else _read_token(given.token_file),
            unix_socket=given.unix_socket,
            read_only=tuple(given.read_only),
            isolation=cast(Isolation, given.isolation),
            die_with_parent=given.die_with_parent,
            memory_bytes=given.memory_bytes,
            processes=given.processes,
            storage=storage,
            required=(*(() if given.isolation == "none" else BASICS), *given.require),
            network_allowed=tuple(given.network_allow),
        )


def _destination(text: str) -> Destination:
    try:
        return Destination.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--token-file {path}: {error}") from error
    if not token:
        raise StartupError(f"--token-file {path}: it is empty")
    return token
