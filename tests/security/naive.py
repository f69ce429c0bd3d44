"""File tools as one writes them who thinks no evil: what the attacks on paths do work on.

    python naive.py TOOL ARGUMENTS          in the workspace

Prints what the tool's caller would get.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile

CONTENT_LIMIT = 5_000_000


def read(path: str) -> str:
    """Like `read_file` and `/artifacts/read`."""
    with open(path, "rb") as file:
        return file.read().decode(errors="replace")


def write(path: str, content: str) -> str:
    """Like `write_file`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        file.write(content)
    return "written"


def listing(path: str) -> str:
    """Like `/artifacts/list`: one name per line."""
    return "".join(f"{name}\n" for name in sorted(os.listdir(path)))


def archive(path: str) -> str:
    """Like `/artifacts/archive`, with what the archive would unpack to."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", dereference=True) as tar:
        tar.add(path, arcname="")
    return unpacked(packed.getvalue())


def unpacked(content: bytes) -> str:
    """The names in an archive and what is in its files."""
    shown = []
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            shown.append(f"{member.name}: {'' if file is None else file.read(CONTENT_LIMIT).decode(errors='replace')}")
    return "\n".join(shown)


TOOLS = {
    "read_file": read,
    "/artifacts/read": read,
    "write_file": write,
    "/artifacts/list": listing,
    "/artifacts/archive": archive,
}

if __name__ == "__main__":
    sys.stdout.write(TOOLS[sys.argv[1]](**json.loads(sys.argv[2])))
