"""Attacks through the names and files of a workspace on those who read, write, list and pack it from outside."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from tests.sandbox_image.running import Api, eventually
from tests.security.attack import Ask, Attack, Outcome, destroys, hangs, leaks, python
from tests.security.field import Field
from tests.security.sites import Outside
from tests.security.table import each, hold

READ, WRITE = "read_file", "write_file"
ARTIFACT, LIST, ARCHIVE = "/artifacts/read", "/artifacts/list", "/artifacts/archive"
SPOIL = {"content": "spoiled"}


def lists(text: str) -> bool:
    return "secret" in text and "listener" in text


def forges_a_line(outcome: Outcome) -> bool:
    """A name looks like an entry of its own."""
    return "\nforged\n" in f"\n{outcome.text}"


ATTACKS = [
    Attack(
        "a link to a file, read",
        "reads the host's files",
        "ln -s $SECRET_FILE link",
        Outside(),
        leaks,
        Ask(READ, {"path": "link"}),
    ),
    Attack(
        "a link to a file, as an artifact",
        "reads the host's files",
        "ln -s $SECRET_FILE link",
        Outside(),
        leaks,
        Ask(ARTIFACT, {"path": "link"}),
        as_user=False,
    ),
    Attack(
        "a chain of links",
        "reads the host's files",
        "ln -s two one; ln -s three two; ln -s $SECRET_FILE three",
        Outside(),
        leaks,
        Ask(READ, {"path": "one"}),
        as_user=False,
    ),
    Attack(
        "a link upwards",
        "reads the host's files",
        "mkdir d; ln -s ../../../../../../../../../.. d/up",
        Outside(),
        leaks,
        Ask(READ, {"path": "d/up/$SECRET_FILE"}),
    ),
    Attack(
        "a link to a directory",
        "reads the host's files",
        "ln -s $GROUNDS d",
        Outside(),
        leaks,
        Ask(READ, {"path": "d/secret"}),
        as_user=False,
    ),
    Attack(
        "an absolute path",
        "reads the host's files",
        "true",
        Outside(),
        leaks,
        Ask(READ, {"path": "$SECRET_FILE"}),
        as_user=False,
    ),
    Attack(
        "an absolute path, as an artifact",
        "reads the host's files",
        "true",
        Outside(),
        leaks,
        Ask(ARTIFACT, {"path": "$SECRET_FILE"}),
        as_user=False,
    ),
    Attack(
        "a path upwards",
        "reads the host's files",
        "true",
        Outside(),
        leaks,
        Ask(READ, {"path": "../../../../../../../../../../..$SECRET_FILE"}),
        as_user=False,
    ),
    Attack(
        "a path down and up",
        "reads the host's files",
        "mkdir -p a/b",
        Outside(),
        leaks,
        Ask(ARTIFACT, {"path": "a/b/../../../../../../../../../../..$SECRET_FILE"}),
        as_user=False,
    ),
    Attack(
        "a path with many slashes",
        "reads the host's files",
        "true",
        Outside(),
        leaks,
        Ask(READ, {"path": "//.//..//..//..//..//..//..$SECRET_FILE"}),
        as_user=False,
    ),
    Attack(
        "the reader's own root",
        "reads the host's files",
        "true",
        Outside(),
        leaks,
        Ask(READ, {"path": "/proc/self/root$SECRET_FILE"}),
    ),
    Attack(
        "a link to the reader's environment",
        "learns the server's secrets",
        "ln -s /proc/$SERVER_PID/environ link",
        Outside(),
        leaks,
        Ask(READ, {"path": "link"}),
    ),
    Attack(
        "a link to the reader's memory",
        "learns the server's secrets",
        "ln -s /proc/self/environ link",
        Outside(),
        lambda outcome: "PATH=" in outcome.text,
        Ask(ARTIFACT, {"path": "link"}),
        as_user=False,
    ),
    Attack(
        "a link into the other slot",
        "reads another trajectory",
        "ln -s $OTHER_WORKSPACE other; ls other/ && echo BREACH",
        Outside(),
        as_user=False,
    ),
    Attack(
        "a write through a link",
        "changes the host",
        "ln -s $VICTIM_FILE link",
        Outside(),
        destroys,
        Ask(WRITE, {"path": "link", **SPOIL}),
    ),
    Attack(
        "a write through a dangling link",
        "makes files on the host",
        "ln -s $SHOWN/planted link",
        Outside(),
        destroys,
        Ask(WRITE, {"path": "link", **SPOIL}),
        as_user=False,
    ),
    Attack(
        "a write through a link to a directory",
        "changes the host",
        "ln -s $GROUNDS d",
        Outside(),
        destroys,
        Ask(WRITE, {"path": "d/victim", **SPOIL}),
    ),
    Attack(
        "a write that makes directories",
        "makes directories on the host",
        "ln -s $SHOWN d",
        Outside(),
        destroys,
        Ask(WRITE, {"path": "d/planted", **SPOIL}),
        as_user=False,
    ),
    Attack(
        "a write to an absolute path",
        "changes the host",
        "true",
        Outside(),
        destroys,
        Ask(WRITE, {"path": "$VICTIM_FILE", **SPOIL}),
        as_user=False,
    ),
    Attack(
        "a write upwards",
        "changes the host",
        "true",
        Outside(),
        destroys,
        Ask(WRITE, {"path": "../../../../../../../../../../..$VICTIM_FILE", **SPOIL}),
        as_user=False,
    ),
    Attack("a FIFO, read", "hangs the reader", "mkfifo f", Outside(), hangs, Ask(READ, {"path": "f"}), control_s=0.5),
    Attack(
        "a FIFO, as an artifact",
        "hangs the reader",
        "mkfifo f",
        Outside(),
        hangs,
        Ask(ARTIFACT, {"path": "f"}),
        control_s=0.5,
        as_user=False,
    ),
    Attack(
        "a FIFO, written",
        "hangs the writer",
        "mkfifo f",
        Outside(),
        hangs,
        Ask(WRITE, {"path": "f", **SPOIL}),
        control_s=0.5,
        as_user=False,
    ),
    Attack(
        "an endless device",
        "hangs the reader",
        "ln -s /dev/zero z",
        Outside(limits=("-v 1000000",)),
        lambda outcome: outcome.expired or "MemoryError" in outcome.text,
        Ask(READ, {"path": "z"}),
        as_user=False,
    ),
    Attack(
        "a sparse file, read",
        "takes the reader's memory",
        "truncate -s 1T huge",
        Outside(limits=("-v 1000000",)),
        lambda outcome: "MemoryError" in outcome.text,
        Ask(READ, {"path": "huge"}),
        as_user=False,
    ),
    Attack(
        "a link, packed", "reads the host's files", "ln -s $SECRET_FILE link", Outside(), leaks, Ask(ARCHIVE, {"path": "."})
    ),
    Attack(
        "a link to a directory, packed",
        "reads the host's files",
        "mkdir d; ln -s $GROUNDS/secret d/in",
        Outside(),
        leaks,
        Ask(ARCHIVE, {"path": "d"}),
        as_user=False,
    ),
    Attack(
        "a link in the path of an archive",
        "reads the host's files",
        "mkdir d; ln -s $SECRET_FILE d/s; ln -s d e",
        Outside(),
        leaks,
        Ask(ARCHIVE, {"path": "e/."}),
        as_user=False,
    ),
    Attack(
        "an archive of another place",
        "reads the host's files",
        "ln -s $GROUNDS/home d; cp $SECRET_FILE $GROUNDS/home/",
        Outside(),
        leaks,
        Ask(ARCHIVE, {"path": "d"}),
        as_user=False,
    ),
    Attack(
        "a listing of another place",
        "learns what there is",
        "ln -s $GROUNDS d",
        Outside(),
        lambda outcome: lists(outcome.text),
        Ask(LIST, {"path": "d"}),
    ),
    Attack(
        "a listing of an absolute path",
        "learns what there is",
        "true",
        Outside(),
        lambda outcome: lists(outcome.text),
        Ask(LIST, {"path": "$GROUNDS"}),
        as_user=False,
    ),
    Attack(
        "a name with a line break",
        "forges an entry of a listing",
        "touch \"$(printf 'a\\nforged\\nb')\"",
        Outside(),
        forges_a_line,
        Ask(LIST, {"path": "."}),
        as_user=False,
    ),
    Attack(
        "a socket in the workspace",
        "hangs or breaks the reader",
        python("""
        socket.socket(socket.AF_UNIX).bind("s")
        os.symlink("s", "l")
        judge(False)
        """),
        Outside(),
        lambda outcome: "Traceback" in outcome.text,
        Ask(READ, {"path": "l"}),
        as_user=False,
    ),
]


@each(ATTACKS)
async def test_attack(field: Field, attack: Attack) -> None:
    await hold(field, attack)


SWAP = python(
    """
    exchange = 2
    os.makedirs("real", exist_ok=True)
    open("real/secret", "w").write("nothing")
    os.symlink(os.environ["GROUNDS"], "link")
    open("started", "w").close()
    end = time.monotonic() + float(os.environ["SECONDS"])
    renameat2 = libc.renameat2
    while time.monotonic() < end and not os.path.exists("stop"):
        renameat2(-100, b"real", -100, b"link", exchange)
    judge(False)
    """
)
CHECK_THEN_OPEN = """
import os, sys, time
end = time.monotonic() + 120
while time.monotonic() < end:
    try:
        if os.path.realpath("real/secret").startswith(os.getcwd() + "/"):
            text = open("real/secret").read()
            if "flag-" in text:
                print(text)
                break
    except OSError:
        pass
open("stop", "w").close()
"""


async def test_a_link_that_comes_and_goes(field: Field) -> None:
    """Between the check of a path and its use, a name can come to mean something else."""
    place = field.new_directory(None)
    place.chmod(0o777)
    attack = Attack("a race", "reads the host's files", f"export SECONDS=120; {SWAP}", Outside())
    swapping = asyncio.create_task(Outside(directory=place).strike(attack, field))
    assert await asyncio.to_thread(eventually, (place / "started").exists)
    control = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", CHECK_THEN_OPEN], cwd=place, capture_output=True, text=True, check=True
    )
    await swapping
    assert field.flag in control.stdout

    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        running = asyncio.create_task(api.bash(f"export SECONDS=0.7; {SWAP}", env=field.variables()))
        tries = 0
        while not running.done():
            for _ in range(20):
                _, answer = await api.post("/artifacts/read", {"slot_id": "slot_0", "path": "real/secret"})
                assert field.flag not in str(answer)
                tries += 1
        assert (await running)["output"] == "HELD\n"
        assert tries >= 20
