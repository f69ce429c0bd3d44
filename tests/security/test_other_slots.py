"""Attacks of one slot on another, and of a trajectory on the one that has the slot after it."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import pytest

from tests.sandbox_image.running import Api, begins, eventually
from tests.security.attack import Attack, python
from tests.security.field import Field
from tests.security.sites import Outside, strike_over


@dataclass(frozen=True)
class Pair:
    """An attack of one slot on another: what the victim does and leaves running, and how the attacker looks for it.

    `$NAME` is a new name each time; the attack has worked when the attacker prints `$CONTENT`, which only the victim knows.
    """

    name: str
    victim: str
    attacker: str


STAY = """
def stay():
    open("ready", "w").close()
    while not os.path.exists("stop"):
        time.sleep(0.01)
"""
ADDRESS = """
family, address = {
    "tcp": (socket.AF_INET, ("127.0.0.1", 20000 + int(os.environ["NUMBER"]))),
    "tcp6": (socket.AF_INET6, ("::1", 20000 + int(os.environ["NUMBER"]))),
    "abstract": (socket.AF_UNIX, "\\0" + os.environ["NAME"]),
    "path": (socket.AF_UNIX, "/tmp/" + os.environ["NAME"]),
}[os.environ["KIND"]]
"""
LISTEN = python(
    """
    listening = socket.socket(family)
    listening.bind(address)
    listening.listen()
    def answer():
        connection, _ = listening.accept()
        connection.sendall(os.environ["CONTENT"].encode())
        connection.close()
    threading.Thread(target=answer, daemon=True).start()
    stay()
    if os.environ["KIND"] == "path":
        os.unlink(address)
    """,
    STAY,
    ADDRESS,
)
CONNECT = python(
    """
    client = socket.socket(family)
    client.connect(address)
    print(client.recv(100).decode())
    """,
    ADDRESS,
)
SHARED_MEMORY = """
def key():
    return 1000 + int(os.environ["NUMBER"])
libc.shmat.restype = ctypes.c_void_p
"""
PUT_IN_SHARED_MEMORY = python(
    """
    segment = libc.shmget(key(), 4096, 0o1666)
    ctypes.memmove(libc.shmat(segment, None, 0), os.environ["CONTENT"].encode() + b"\\0", 64)
    stay()
    libc.shmctl(segment, 0, None)
    """,
    SHARED_MEMORY,
    STAY,
)
TAKE_FROM_SHARED_MEMORY = python(
    """
    segment = libc.shmget(key(), 4096, 0)
    if segment >= 0:
        print(ctypes.string_at(libc.shmat(segment, None, 0x1000)))
    """,
    SHARED_MEMORY,
)
PUT_IN_KEYRING = python(
    """
    content = os.environ["CONTENT"].encode()
    for ring in (-3, -4, -5):
        print(syscall("add_key", b"user", os.environ["NAME"].encode(), content, len(content), ring))
    stay()
    """,
    STAY,
)
TAKE_FROM_KEYRING = python(
    """
    for ring in (-3, -4, -5):
        found, why = syscall("keyctl", 10, ring, b"user", os.environ["NAME"].encode(), 0)
        buffer = ctypes.create_string_buffer(100)
        if found > 0 and syscall("keyctl", 11, found, buffer, 100)[0] > 0:
            print(buffer.value)
    """
)

STAY_SH = "touch ready; while [ ! -e stop ]; do sleep 0.01; done"

PAIRS = [
    Pair("files in /tmp", f"echo $CONTENT > /tmp/$NAME; {STAY_SH}; rm -f /tmp/$NAME", "cat /tmp/$NAME"),
    Pair("files in /dev/shm", f"echo $CONTENT > /dev/shm/$NAME; {STAY_SH}; rm -f /dev/shm/$NAME", "cat /dev/shm/$NAME"),
    Pair("files in /var/tmp", f"echo $CONTENT > /var/tmp/$NAME; {STAY_SH}; rm -f /var/tmp/$NAME", "cat /var/tmp/$NAME"),
    Pair(
        "the home directory",
        f"echo $CONTENT > $HOME/$NAME; {STAY_SH}; rm -f $HOME/$NAME",
        "cat $HOME/$NAME /home/*/$NAME /root/$NAME",
    ),
    Pair("arguments of processes", f'sh -c "{STAY_SH}" $CONTENT', "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"),
    Pair(
        "environments of processes",
        f'sh -c "{STAY_SH}"',
        "for f in /proc/[0-9]*/environ; do tr '\\0' '\\n' < $f | grep ^CONTENT= ; done",
    ),
    Pair("a port on the loopback", f"export KIND=tcp; {LISTEN}", f"export KIND=tcp; {CONNECT}"),
    Pair("a port on the IPv6 loopback", f"export KIND=tcp6; {LISTEN}", f"export KIND=tcp6; {CONNECT}"),
    Pair("an abstract socket", f"export KIND=abstract; {LISTEN}", f"export KIND=abstract; {CONNECT}"),
    Pair("a socket in /tmp", f"export KIND=path; {LISTEN}", f"export KIND=path; {CONNECT}"),
    Pair("System V shared memory", PUT_IN_SHARED_MEMORY, TAKE_FROM_SHARED_MEMORY),
    Pair("the kernel's key rings", PUT_IN_KEYRING, TAKE_FROM_KEYRING),
]


async def outside(field: Field, victim: Attack, attacker: Attack) -> str:
    """What the attacker gets where nothing is between the two."""
    place = field.new_directory(None)
    place.chmod(0o777)
    running = asyncio.create_task(Outside(directory=place).strike(victim, field))
    assert await asyncio.to_thread(eventually, (place / "ready").exists)
    taken = await Outside().strike(attacker, field)
    (place / "stop").touch()
    await running
    return taken.text


async def between(field: Field, victim: Attack, attacker: Attack) -> str:
    """What the attacker gets from another slot."""
    one, two = Api.over(field.server), Api.over(field.server)
    two.slot = "slot_1"
    async with one.session, two.session:
        await one.reset()
        await two.reset()
        running = asyncio.create_task(strike_over(one, victim, field))
        # One that fails tells nothing to anybody.
        waiting = asyncio.create_task(begins(one, "ready"))
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        taken = await strike_over(two, attacker, field)
        await one.reset()
        await running
    return taken.text


@pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])
async def test_between_slots(field: Field, pair: Pair) -> None:
    name, content = secrets.token_hex(8), secrets.token_hex(12)
    public = f"export NAME={name} NUMBER={secrets.randbelow(10_000)}; "
    known = f"{public} export CONTENT={content}; "
    victim, attacker = (
        Attack(pair.name, "another trajectory's work", script, Outside())
        for script in (known + pair.victim, public + pair.attacker)
    )
    assert content in await outside(field, victim, attacker), "the control does not show that this can work"
    assert content not in await between(field, victim, attacker)
