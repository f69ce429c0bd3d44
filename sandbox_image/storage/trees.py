"""Removing and copying of file trees that a slot has had its hands on."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sandbox_image.errors import SlotServerError
from sandbox_image.kernel import linux

_NAMES_PER_PASS = 10_000
_OPEN_LEVELS = 64
_SAID_BYTES = 65536


class TreeCopyError(SlotServerError):
    """A tree could not be copied; the text is what `cp` said."""


def remove_tree(path: str | Path) -> None:
    """Delete a file or a directory with all that is in it; nothing there is fine.

    Works on what `shutil.rmtree` gives up on: trees of any depth (what is too deep is moved up to the top, so that neither the
    stack nor the number of descriptors grows) and directories of any mode. Links are removed, never followed.

    Raises:
        OSError: something in it belongs to somebody else, or the file system refuses.
    """
    parent, name = os.path.split(os.path.abspath(path))
    try:
        holder = os.open(parent, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        if _unlink(name, holder):
            return
        top = _open_directory(name, holder)
        if top is None:
            return
        try:
            _empty(top, top, secrets.token_hex(8), itertools.count(), 0)
        finally:
            os.close(top)
        _rmdir(name, holder)
    finally:
        os.close(holder)


def move_tree(source: str | Path, target: str | Path) -> None:
    """Rename a directory to another place on its disk, whatever its mode; its owner can do what he likes in it afterwards.

    A directory that changes its place gets another `..`, which takes the right to write in it.

    Raises:
        OSError: it cannot be moved.
    """
    parent, name = os.path.split(os.path.abspath(source))
    holder = os.open(parent, os.O_PATH | os.O_DIRECTORY)
    try:
        directory = _open_directory(name, holder)
    finally:
        os.close(holder)
    if directory is not None:
        os.close(directory)
    os.rename(source, target)


def _unlink(name: str, holder: int) -> bool:
    """Whether the entry is gone; False for a directory."""
    try:
        os.unlink(name, dir_fd=holder)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        return False
    return True


def _rmdir(name: str, holder: int) -> None:
    try:
        os.rmdir(name, dir_fd=holder)
    except FileNotFoundError:
        return


def _open_directory(name: str, holder: int) -> int | None:
    """Open a directory for deleting in it, whatever its mode; None if it is gone."""
    try:
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=holder)
    except FileNotFoundError:
        return None
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) & 0o700 != 0o700:
            # There is no fchmod for a handle, and no chmod that does not follow links.
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
    finally:
        os.close(handle)


def _some_names(directory: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in itertools.islice(entries, _NAMES_PER_PASS)]


def _empty(directory: int, top: int, prefix: str, serial: itertools.count[int], depth: int) -> None:
    while names := _some_names(directory):
        for name in names:
            if _unlink(name, directory):
                continue
            # Also before a move: it needs write permission for what is moved, because its `..` changes.
            inner = _open_directory(name, directory)
            if inner is None:
                continue
            try:
                if depth < _OPEN_LEVELS:
                    _empty(inner, top, prefix, serial, depth + 1)
            finally:
                os.close(inner)
            if depth < _OPEN_LEVELS:
                _rmdir(name, directory)
            else:
                os.rename(name, f"{prefix}-{next(serial)}", src_dir_fd=directory, dst_dir_fd=top)


async def copy_tree(source: str, target: str, owner: int | None) -> None:
    """Copy a directory to a path where nothing is yet: modes, times, links and special files as they are.

    Shares blocks where the file system can. `owner` (user and group id) gets everything; None leaves it to the caller.

    Raises:
        TreeCopyError: `cp` failed, for example because the disk is full. What was copied is left at `target`.
    """
    await _run("cp", "-a", "--reflink=auto", "--no-preserve=ownership", "-T", "--", source, target)
    if owner is not None:
        await _run("chown", "-hR", f"{owner}:{owner}", "--", target)


async def copy_files(source: str, target: str, descriptors: Sequence[int]) -> None:
    """Copy a directory to a path where nothing is yet, with all that an overlay has noted in it: owners, devices, attributes.

    Paths may lead through `/proc/self/fd` if their descriptors are given.

    Raises:
        TreeCopyError: as `copy_tree`.
    """
    kept = "--preserve=mode,ownership,timestamps,links,xattr"
    await _run("cp", "-dR", kept, "--reflink=auto", "-T", "--", source, target, descriptors=descriptors)


async def disk_usage(directory: Path) -> int:
    """The bytes that a directory takes on disk with all that is in it; what cannot be read is not counted.

    Raises:
        TreeCopyError: `du` failed.
    """
    said = await _run("du", "-sx", "--block-size=1", "--", str(directory), tolerated=(1,))
    return int(said.split(b"\t", 1)[0] or b"0")


async def _run(*argv: str, descriptors: Sequence[int] = (), tolerated: Sequence[int] = ()) -> bytes:
    """Run a program; what it prints."""
    # Nothing may write into a data directory any more when the server is gone.
    command = ["setpriv", "--pdeathsig", "KILL", *argv]
    missing = next((program for program in (command[0], argv[0]) if shutil.which(program) is None), None)
    if missing is not None:
        raise TreeCopyError(f"{missing} is not installed")
    outputs = [os.memfd_create(name) for name in ("said", "complaint")]
    try:
        process = _start(command, outputs, descriptors)
        try:
            await _ended(process)
        except asyncio.CancelledError:
            process.kill()
            raise
        finally:
            status = process.wait()
        said, complaint = (os.pread(output, _SAID_BYTES, 0) for output in outputs)
    finally:
        for output in outputs:
            os.close(output)
    if status != 0 and status not in tolerated:
        lines = complaint.decode(errors="replace").strip().splitlines()
        raise TreeCopyError(lines[0] if lines else f"{argv[0]} ended with status {status}")
    return said


def _start(command: Sequence[str], outputs: Sequence[int], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    # Some of the files may be closed even to whom they belong.
    with linux.rights(inherited=True):
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=outputs[0], stderr=outputs[1], pass_fds=descriptors)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
