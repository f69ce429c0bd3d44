"""What a reset and a fresh workspace cost beside a bare process.

    python benchmarks/workspaces.py [--rounds 100] [--python PATH]

A slot server is asked over its unix socket, by a blocking socket and one request after another, in turns with a bare
`posix_spawn` of `sh -c true`, so that a busy machine disturbs all alike. Before each turn the slot has run a command, as a
trajectory would have. The layer is a git repository of 1,000 files with an environment of 5,000 files.

- reset: until the next trajectory has an empty workspace; a box was started ahead, as it is after a trajectory of any length
- reset to the layer: the same with the layer's files
- fresh slot: reset to the layer, and a first command `true` in it, until that has finished
- fresh slot, nothing ahead: the same at once after the reset before, so that a box has to be started on the way
- snapshot: a copy of the slot's own files, of which there are 100, while the slot goes on

Where it runs as root, it is measured a second time with a server that is an ordinary user, for whom `--python` may name an
interpreter that such a user can run. Needs bubblewrap and git.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND = ["/bin/sh", "-c", "true"]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
PAUSE_S = 0.3
"""How long a trajectory is, at least: the time in which a box is started ahead."""
BUILD = """
set -e
mkdir repo env && cd repo && git init -q
python3 - <<'END'
import os
for number in range(1000):
    os.makedirs(f"package{number % 40}", exist_ok=True)
    open(f"package{number % 40}/module{number}.py", "w").write(f"value = {number}\\n" * 20)
for number in range(5000):
    os.makedirs(f"../env/lib/package{number % 200}", exist_ok=True)
    open(f"../env/lib/package{number % 200}/module{number}.py", "w").write(f"value = {number}\\n" * 20)
END
git add . && git -c user.name=x -c user.email=x@y commit -qm x
"""


class Connection:
    """Requests to a slot server, one after another."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))

    def post(self, route: str, **payload: Any) -> dict[str, Any]:
        """Send a request; its answer."""
        body = json.dumps(payload).encode()
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)
        answer = self._socket.recv(65536)
        head_bytes, _, content = answer.partition(b"\r\n\r\n")
        length = int(head_bytes.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(content) < length:
            content += self._socket.recv(65536)
        if b" 200 " not in head_bytes.split(b"\r\n")[0]:
            sys.exit(content.decode())
        return dict(json.loads(content))

    def run(self, command: str) -> None:
        """Run a command that must succeed."""
        call = {"slot_id": "slot_0", "tool": "bash", "args": {"command": command}, "timeout": 300.0}
        result = self.post("/execute", **call)
        if not result["success"]:
            sys.exit(str(result))


def bare() -> None:
    """What everything is compared with."""
    os.waitpid(os.posix_spawn(COMMAND[0], COMMAND, ENVIRONMENT), 0)


@contextmanager
def slot_server(directory: Path, command: list[str]) -> Iterator[Connection]:
    """A slot server with one slot and the layer."""
    command = [*command, "-m", "sandbox_image.server", "--die-with-parent", "--slots", "1"]
    command += ["--unix-socket", str(directory / "socket"), "--data-dir", str(directory / "data")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{CHECKOUT}:{sysconfig.get_path('purelib')}"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/") as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise OSError("the slot server did not start")
        connection = Connection(directory / "socket")
        connection.post("/reset", slot_id="slot_0", for_layer=True)
        connection.run(BUILD)
        connection.post("/layers", slot_id="slot_0", name="layer")
        yield connection
        process.terminate()


def ways(server: Connection) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is done before each turn and is not measured, and what is."""
    snapshots = iter(range(1_000_000))

    def use() -> None:
        server.run("true")
        time.sleep(PAUSE_S)

    def use_layer() -> None:
        server.post("/reset", slot_id="slot_0", layer="layer")
        use()

    def fresh() -> None:
        server.post("/reset", slot_id="slot_0", layer="layer")
        server.run("true")

    def fill() -> None:
        use_layer()
        server.run("mkdir own; cd own; seq 100 | xargs touch")

    def snapshot() -> None:
        server.post("/layers", slot_id="slot_0", name=f"snapshot-{next(snapshots)}", snapshot=True)

    return {
        "bare": (lambda: None, bare),
        "reset": (use, lambda: server.post("/reset", slot_id="slot_0")),
        "reset to the layer": (use, lambda: server.post("/reset", slot_id="slot_0", layer="layer")),
        "fresh slot": (use, fresh),
        "fresh slot, nothing ahead": (fresh, fresh),
        "snapshot of 100 files": (fill, snapshot),
    }


def measure(server: Connection, rounds: int) -> dict[str, list[float]]:
    """Let every way have its turn, again and again; the seconds of each."""
    measured = ways(server)
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, (prepare, work) in measured.items():
            prepare()
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return times


def table(title: str, times: dict[str, list[float]]) -> str:
    """The medians, beside the bare process."""
    base = statistics.median(times["bare"])
    rows = [f"{title:28}{'p50 ms':>9}{'p95 ms':>9}{'x bare':>9}"]
    for name, seconds in times.items():
        middle, late = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
        rows.append(f"{name:28}{middle * 1000:9.3f}{late * 1000:9.3f}{middle / base:9.2f}")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--python", default=sys.executable, help="interpreter for the server that is an ordinary user")
    given = parser.parse_args()
    servers = {"root" if os.geteuid() == 0 else "ordinary user": [sys.executable]}
    if os.geteuid() == 0:
        servers["ordinary user"] = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", given.python]
    for title, command in servers.items():
        with tempfile.TemporaryDirectory(prefix="workspaces-", dir="/tmp") as name:
            directory = Path(name)
            directory.chmod(0o777)
            try:
                with slot_server(directory, command) as server:
                    sys.stdout.write(table(title, measure(server, given.rounds)) + "\n")
            except OSError as error:
                sys.stdout.write(f"{title}: {error}\n")


if __name__ == "__main__":
    main()
