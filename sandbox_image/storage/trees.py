"""Removes, moves and copies directory trees whose content a slot has chosen."""

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
    """A tree could not be copied; the text is the program's error message."""


def remove_tree(path: str | Path) -> None:
    """Delete a file or a directory with its content; does nothing if there is none.

    Deletes trees on which `shutil.rmtree` fails: of any depth (a directory that is too deep is moved up to the top, so that
    neither the stack nor the number of descriptors grows), with directories of any mode. Links are never followed.

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
    """Rename a directory within its file system, whatever its mode; its owner can read and write it afterwards.

    A directory that gets another parent must be writable, because its `..` changes.

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
    """Unlink an entry that is no directory; False if it is one."""
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
    """Open a directory to delete entries of it, whatever its mode; None if it is gone."""
    try:
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=holder)
    except FileNotFoundError:
        return None
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) & 0o700 != 0o700:
            # fchmod refuses O_PATH descriptors, and chmod follows links.
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
            # Before a move as well: a directory that gets another parent must be writable.
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
    """Copy a directory to a new path, with modes, times, links and special files.

    Shares blocks if the file system supports that. The copy is given to `owner` (user and group id), or else is the server's.

    Raises:
        TreeCopyError: `cp` failed, for example because the disk is full. What was copied is left at `target`.
    """
    await _run("cp", "-a", "--reflink=auto", "--no-preserve=ownership", "-T", "--", source, target)
    if owner is not None:
        await _run("chown", "-hR", f"{owner}:{owner}", "--", target)


async def copy_files(source: str, target: str, descriptors: Sequence[int]) -> None:
    """Copy the upper directory of an overlay to a new path, with owners, devices and extended attributes.

    Paths may lead through `/proc/self/fd` of the given descriptors.

    Raises:
        TreeCopyError: as `copy_tree`.
    """
    kept = "--preserve=mode,ownership,timestamps,links,xattr"
    await _run("cp", "-dR", kept, "--reflink=auto", "-T", "--", source, target, descriptors=descriptors)


async def disk_usage(directory: Path) -> int:
    """The disk space of a directory and its content in bytes, without what cannot be read.

    Raises:
        TreeCopyError: `du` failed.
    """
    said = await _run("du", "-sx", "--block-size=1", "--", str(directory), tolerated=(1,))
    return int(said.split(b"\t", 1)[0] or b"0")


async def _run(*argv: str, descriptors: Sequence[int] = (), tolerated: Sequence[int] = ()) -> bytes:
    """Run a program and return what it prints."""
    # The program dies with the server: nothing may write into the data directory afterwards.
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
    # An ordinary user may have files without read permission for their owner.
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
