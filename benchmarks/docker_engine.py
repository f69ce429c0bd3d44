"""A Docker engine to measure: the one that is reachable, or one of our own that leaves nothing behind."""

from __future__ import annotations

import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import CallFailedError, UnavailableError, spawn

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
SLEEP = ["sleep", "2h"]

NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""What a program mounts and starts in them goes when it does."""

# The engine and containerd leave files in these.
PRIVATE_DIRECTORIES = """
mount -t tmpfs tmpfs /run
for name in etc opt; do
    mkdir -p /run/$name/upper /run/$name/work
    mount -t overlay -o lowerdir=/$name,upperdir=/run/$name/upper,workdir=/run/$name/work overlay /$name
done
exec dockerd "$@"
"""


def run(*command: str | Path) -> str:
    """What a program prints.

    Raises:
        UnavailableError: it fails; with its last line.
    """
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode != 0:
        reason = (ended.stderr.strip() or ended.stdout.strip() or f"status {ended.returncode}").splitlines()[-1]
        raise UnavailableError(f"{command[0]}: {reason}")
    return ended.stdout.strip()


@dataclass(frozen=True)
class DockerEngine:
    """A reachable engine, the image to run, and the label of all containers of this run. None of them has a network."""

    docker: str
    image: str
    label: str

    @property
    def run_options(self) -> list[str]:
        """Options of `docker run` for a container of ours."""
        return ["--rm", "--network", "none", "--label", self.label]

    @property
    def description(self) -> str:
        """Its version and its client's."""
        return run(self.docker, "version", "--format", "Docker engine {{.Server.Version}}, client {{.Client.Version}}")

    def start(self) -> str:
        """Start a container; its id."""
        return run(self.docker, "run", "-d", *self.run_options, self.image, *SLEEP)

    def execute(self, container: str) -> None:
        """Run `true` by the command line."""
        spawn((self.docker, "exec", container, "sh", "-c", "true"), os.environ)

    def remove(self, *containers: str) -> None:
        """Kill and delete containers."""
        run(self.docker, "rm", "--force", *containers)

    def remove_all(self) -> None:
        """Kill and delete all containers of this run."""
        left = run(self.docker, "ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={self.label}").split()
        if left:
            self.remove(*left)


class EngineApi:
    """The engine's own HTTP API, which spares the start of the command line's program."""

    def __init__(self, engine: DockerEngine) -> None:
        """Raises UnavailableError if the engine does not listen on a unix socket."""
        self._engine = engine
        host = os.environ.get("DOCKER_HOST") or run(
            engine.docker, "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"
        )
        scheme, _, self._path = host.partition("://")
        if scheme != "unix":
            raise UnavailableError(f"the engine listens on {host}, not on a unix socket")
        self._http = http.client.HTTPConnection("localhost")

    def start(self) -> str:
        """Start a container; its id."""
        name, _, value = self._engine.label.partition("=")
        settings = {"AutoRemove": True, "NetworkMode": "none"}
        wanted = {"Image": self._engine.image, "Cmd": SLEEP, "HostConfig": settings, "Labels": {name: value}}
        container: str = self._ask("POST", "/containers/create", wanted)["Id"]
        self._ask("POST", f"/containers/{container}/start", {})
        return container

    def execute(self, container: str) -> None:
        """Run `true`."""
        command = {"AttachStdout": True, "AttachStderr": True, "Cmd": ["sh", "-c", "true"]}
        name = self._ask("POST", f"/containers/{container}/exec", command)["Id"]
        self._ask("POST", f"/exec/{name}/start", {"Detach": False})
        status = self._ask("GET", f"/exec/{name}/json", None)["ExitCode"]
        if status != 0:
            raise CallFailedError(f"true ended with status {status} in a container")

    def _ask(self, method: str, route: str, body: object) -> Any:
        if self._http.sock is None:
            self._http.sock = socket.socket(socket.AF_UNIX)
            self._http.sock.connect(self._path)
        content = None if body is None else json.dumps(body)
        self._http.request(method, route, content, {"Content-Type": "application/json"})
        answer = self._http.getresponse()
        payload = answer.read()
        if answer.status >= 400:
            raise CallFailedError(f"{method} {route}: {payload.decode(errors='replace')}")
        return json.loads(payload) if answer.getheader("Content-Type") == "application/json" else None


@contextmanager
def docker_engine(directory: Path, image: str | None) -> Iterator[DockerEngine]:
    """The reachable engine, or one started for this; with an image of the user's, or of this Debian's smallest system.

    Raises:
        UnavailableError: neither is to be had.
    """
    docker = shutil.which("docker")
    if docker is None:
        raise UnavailableError("docker is not installed")
    with reachable_engine(docker, directory):
        engine = DockerEngine(docker, image or f"hermes-envs-compare-{os.getpid()}", f"hermes-envs-compare={os.getpid()}")
        try:
            if image is None:
                import_image(engine, directory / "image")
            else:
                run(docker, "image", "inspect", "--format", "{{.Id}}", image)
            yield engine
        finally:
            engine.remove_all()
            if image is None:
                subprocess.run([docker, "rmi", "--force", engine.image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def import_image(engine: DockerEngine, root: Path) -> None:
    """Make the image: bootstrapped without the recommended, the optional and the compilers."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise UnavailableError("only root can make an image, with debootstrap; or name one with --image")
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    # What it mounts and starts meanwhile must not be there any more when the directory is deleted.
    run(*NAMESPACES, "debootstrap", "--variant=minbase", suite, root)
    run("sh", "-c", 'tar -C "$1" -c . | "$2" import - "$3"', "sh", root, engine.docker, engine.image)
    shutil.rmtree(root)


@contextmanager
def reachable_engine(docker: str, directory: Path) -> Iterator[None]:
    """An engine that the command line reaches while the block runs."""
    if reaches_engine(docker):
        yield
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise UnavailableError("no Docker engine is reachable, and only root can start one, with dockerd")
    directory.mkdir()
    before = os.environ.get("DOCKER_HOST")
    host = os.environ["DOCKER_HOST"] = f"unix://{directory}/socket"
    cgroup = f"hermes-envs-compare-{os.getpid()}"
    options = ["--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec", "--pidfile", f"{directory}/pid"]
    options += ["--host", host, "--cgroup-parent", f"/{cgroup}", "--exec-opt", "native.cgroupdriver=cgroupfs"]
    options += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
    log = directory / "log"
    command = [*NAMESPACES, "sh", "-ec", PRIVATE_DIRECTORIES, "dockerd", *options]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not reaches_engine(docker):
                if process.poll() is not None or time.monotonic() > deadline:
                    last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
                    raise UnavailableError(f"dockerd does not start: {last}")
                time.sleep(0.1)
            yield
        finally:
            stop(process)
            remove_cgroups(cgroup)
            os.environ.pop("DOCKER_HOST")
            if before is not None:
                os.environ["DOCKER_HOST"] = before


def reaches_engine(docker: str) -> bool:
    """Whether an engine answers."""
    return subprocess.run([docker, "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the engine and all that it started."""
    if process.poll() is None:
        # unshare waits for the engine and is deaf to this.
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def remove_cgroups(name: str) -> None:
    """Remove the groups that the engine made for its containers, which are empty now."""
    root = Path("/sys/fs/cgroup")
    for group in (*root.glob(name), *root.glob(f"*/{name}")):
        for directory, _, _ in os.walk(group, topdown=False):
            os.rmdir(directory)
