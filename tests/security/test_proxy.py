"""Attacks of slots that may reach the network: by its proxy, on the machine that the proxy runs on and on what is near it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tests.sandbox_image.running import Api, begins
from tests.security.attack import Attack, leaks, python
from tests.security.field import Field, field_of
from tests.security.sites import InSlot, Outside
from tests.security.table import hold, still_works
from tests.support.growth import slowest

ASK = """
port = int(os.environ["TCP_PORT"])
def ask(head, host="127.0.0.1"):
    "What comes back: from the proxy where there is one, else from the host itself, as from a proxy that asks no questions."
    proxy = os.environ.get("http_proxy")
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", 3128) if proxy else (host.strip("[]"), port), 1) as client:
            if proxy:
                client.sendall(head.format(host=host, port=port).encode("latin-1"))
            while chunk := client.recv(4096):
                answer += chunk
    except OSError as error:
        print(host, error)
    print(answer.decode("latin-1"))
"""
TUNNEL = "CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n"
FETCH = "GET http://{host}:{port}/ HTTP/1.1\r\nHost: example.org\r\n\r\n"


def ask_for(hosts: Sequence[str], *heads: str) -> str:
    """A script that sends each head for each host."""
    return python(
        f"""
        for host in {list(hosts)}:
            for head in {list(heads)}:
                ask(head, host)
        judge(False)
        """,
        ASK,
    )


LOOPBACKS = [
    "127.0.0.1",
    "localhost",
    "LOCALHOST",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "0.0.0.0",
    "0",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
]


async def test_the_loopback_by_the_proxy(field: Field) -> None:
    """Whatever the machine's loopback is called, the proxy does not connect to it."""
    attack = Attack("", "talks to services of the machine", ask_for(LOOPBACKS, TUNNEL, FETCH), Outside(), leaks)
    control = await attack.control.strike(attack, field)
    assert control.text.count(field.flag) == 2 * len(LOOPBACKS), control
    outcome = await hold(field, attack, InSlot(network=True))
    assert outcome.text.count("403 Forbidden") + outcome.text.count("400 Bad Request") == 2 * len(LOOPBACKS), outcome


SPELLINGS = [
    "http://example.org@{host}:{port}/",
    "http://example.org:80@{host}:{port}/",
    "http://{host}:{port}#@example.org/",
    "http://{host}:{port}?@example.org/",
    "http://{host}:{port}\\@example.org/",
    "http://{host}:{port}%2f@example.org/",
    "http://{host}.:{port}/",
    "http:{host}:{port}/",
    "http:///{host}:{port}/",
    "HTTP://{host}:{port}/",
    "//{host}:{port}/",
    "http://[{host}]:{port}/",
    "http://{host}:{port}/ HTTP/1.1\r\nHost: example.org\r\n\r\nGET http://{host}:{port}/",
]


async def test_addresses_that_read_two_ways(field: Field) -> None:
    """The proxy connects to what it has checked, however an address is written."""
    heads = [f"GET {spelling} HTTP/1.1\r\nHost: {{host}}\r\n\r\n" for spelling in SPELLINGS]
    heads += [
        "CONNECT {host}:{port} HTTP/1.0\r\n\r\n",
        "CONNECT example.org@{host}:{port} HTTP/1.1\r\n\r\n",
        "CONNECT [::ffff:{host}%25lo]:{port} HTTP/1.1\r\n\r\n",
        "POST http://{host}:{port}/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ]
    script = ask_for(["127.0.0.1"], *heads)
    attack = Attack("", "talks to services of the machine", script, Outside(), leaks)
    await hold(field, attack, InSlot(network=True))


NEIGHBOURS = [
    "169.254.169.254", "[fd00:ec2::254]", "168.63.129.16", "10.0.0.1", "172.17.0.1", "192.168.1.1", "100.64.0.1", "[fe80::1]",
    "[fc00::1]", "[::1]", "[::]", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]", "[2001::1]",
]  # fmt: skip


async def test_neighbours_by_the_proxy(field: Field) -> None:
    """A cloud's metadata, private networks, and addresses that stand for others are refused before anybody connects."""
    script = python(
        f"""
        for host in {NEIGHBOURS}:
            with socket.create_connection(("127.0.0.1", 3128)) as client:
                client.sendall(f"CONNECT {{host}}:80 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
                answer = client.recv(4096)
            # Who tried to connect first would say that it timed out, or that there is no route.
            judge(b"403" not in answer.split(b"\\r\\n")[0], host, answer)
        """
    )
    api = Api.over(field.server)
    async with api.session:
        await api.reset(network=True)
        output = await api.output(script)
        assert output.count("HELD") == len(NEIGHBOURS), output


async def test_a_host_that_is_allowed(field: Field) -> None:
    """The control of all of these: the same requests where the policy does not forbid them."""
    with field_of("--network-allow", "127.0.0.1", other_user=field.other_user) as open_field:
        for head in (TUNNEL, FETCH):
            attack = Attack("", "", ask_for(["127.0.0.1"], head), Outside(), leaks)
            assert leaks(await InSlot(network=True).strike(attack, open_field))
            other = Attack("", "", ask_for(["127.1"], head), Outside(), leaks)
            assert not leaks(await InSlot(network=True).strike(other, open_field))


async def test_past_the_proxy(field: Field) -> None:
    """Without the proxy there is nowhere to go, and a slot without network has no proxy."""
    direct = python(
        """
        port = int(os.environ["TCP_PORT"])
        for kind, address in ((socket.SOCK_STREAM, ("127.0.0.1", port)), (socket.SOCK_DGRAM, ("8.8.8.8", 53))):
            try:
                client = socket.socket(socket.AF_INET, kind)
                client.settimeout(2)
                client.connect(address)
                judge(True, address)
            except OSError as error:
                judge(False, address, error)
        """
    )
    await hold(field, Attack("", "talks to anybody", direct, Outside()), InSlot(network=True))
    proxy = python('socket.create_connection(("127.0.0.1", 3128), 2)\njudge(True)')
    # The control: a slot with network.
    attack = Attack("", "reaches the network against the policy", proxy, InSlot(network=True))
    await hold(field, attack)


async def test_a_flood_of_the_proxy(field: Field) -> None:
    """Thousands of connections and heads without end cost one slot its network, and nobody else anything."""
    flood = python(
        """
        clients = []
        open("begun", "w").close()
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            try:
                client = socket.create_connection(("127.0.0.1", 3128), 1)
                client.setblocking(False)
                client.send(b"GET http://example.org/ HTTP/1.1\\r\\nX: " + b"x" * 100_000)
                clients.append(client)
            except OSError:
                pass
            if len(clients) > 2000:
                clients = []
        judge(False)
        """
    )
    one, two = Api.over(field.server), Api.over(field.server)
    two.slot = "slot_1"
    async with one.session, two.session:
        await one.reset(network=True)
        await two.reset()
        alone = await slowest(lambda: two.output("true"), count=10)
        flooding = asyncio.create_task(one.bash(flood))
        assert await begins(one)
        beside = await slowest(lambda: two.output("true"), count=10, during=flooding)
        assert "HELD" in (await flooding)["output"]
        assert beside < 20 * alone + 1
        await one.reset(network=True)
        await one.output(python('socket.create_connection(("127.0.0.1", 3128), 2)'))
    await still_works(field)
