"""How the boxes of a server are built: what a box shows, its limits, and the bubblewrap command line."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sandbox_image import compile_init, init
from sandbox_image.box.network import NetworkPolicy
from sandbox_image.box.proxy import ENVIRONMENT
from sandbox_image.errors import StartupError
from sandbox_image.kernel import seccomp
from sandbox_image.kernel.cgroups import ControlGroups, SlotGroup
from sandbox_image.kernel.shared_trees import SharedTrees
from sandbox_image.protocol import WORKSPACE

Isolation = Literal["bubblewrap", "none"]

FIRST_SLOT_UID = 60_000
HOME = "/home/user"
HOSTNAME = "sandbox"
INIT_IN_BOX = "/init.py"
COMPILED_INIT_IN_BOX = "/libinit.so"
PROCESS_LIMITS = {"NOFILE": 4096, "CORE": 0, "FSIZE": 4 * 1024**3, "MEMLOCK": 64 * 1024}
"""Resource limits (`RLIMIT_*`) of every process in a box that no option changes."""
TMPFS_BYTES = {"/tmp": 1024**3, HOME: 512 * 1024**2, "/dev/shm": 256 * 1024**2, "/run": 16 * 1024**2}
"""The writable directories of a box beside the workspace, in memory, and their sizes if the slot's memory is large enough."""

_SHOWN_COMMAND_CHARACTERS = 1024
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SETPRIV = "/usr/bin/setpriv"
_MERGED_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/ca-certificates",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust",
    "/etc/localtime",
    "/etc/timezone",
    "/etc/mime.types",
    "/etc/protocols",
    "/etc/services",
)
_NEEDED_OPTIONS = ("--as-pid-1", "--die-with-parent", "--new-session", "--size", "--remount-ro", "--unshare-cgroup-try")
# The box has its own file systems there: no tree can be shown at or around them.
_RESERVED = ("/proc", "/dev", "/run", "/etc", WORKSPACE)


@dataclass(frozen=True)
class SlotDirectory:
    """One of the two directories of a slot on the host, each the home of one box and its workspace.

    `files` has what describes the slot's user. `root` contains the mount point of the workspace and nothing else, by a path
    that the slot's user can reach. `uid` None is the server's own user. `seen_as` is the workspace's path for commands.
    """

    files: Path
    root: Path
    uid: int | None
    seen_as: str
    group: SlotGroup

    @property
    def workspace(self) -> Path:
        """The workspace on the host."""
        return self.root / WORKSPACE.removeprefix("/")

    @property
    def unmounted(self) -> Path:
        """The workspace if it is a plain directory and not mounted, by a path that can be renamed."""
        return self.files / self.root.name / WORKSPACE.removeprefix("/")


@dataclass(frozen=True)
class BoxLimits:
    """What one box may use: whether it reaches the network, and the memory limit of its slot."""

    network: bool
    memory_bytes: int


@dataclass(frozen=True)
class Blueprint:
    """What the boxes of a server have in common."""

    isolation: Isolation
    slots_directory: Path
    shared_trees: SharedTrees
    groups: ControlGroups
    shown: tuple[str, ...]
    prefix: str
    compiled_init: bool
    required: tuple[str, ...]
    policy: NetworkPolicy
    bubblewrap: str = ""
    options: frozenset[str] = field(default_factory=frozenset)
    seccomp_filter: bytes | None = None

    @classmethod
    def prepare(
        cls,
        isolation: Isolation,
        data_dir: Path,
        read_only: Sequence[str],
        groups: ControlGroups,
        *,
        keep: Sequence[str] = (),
        required: Sequence[str] = (),
        policy: NetworkPolicy,
    ) -> Blueprint:
        """Find out what the host offers, and make what boxes show reachable for the slots' users.

        Boxes without a defence that is `required` do not start. What boxes need is put into `data_dir/slots`. Must run before
        the process has a second thread.

        Raises:
            StartupError: something is missing; the text names the remedy.
        """
        bubblewrap, options = ("", frozenset[str]()) if isolation == "none" else _find_bubblewrap()
        if os.geteuid() == 0 and not os.path.exists(_SETPRIV):
            raise StartupError(f"{_SETPRIV} is not there; install util-linux or be an ordinary user")
        prefix = os.path.realpath(sys.base_prefix)
        shown = [*([] if _is_below(prefix, "/usr") else [prefix]), *(_check_shown(path) for path in read_only)]
        slots_directory = data_dir / "slots"
        slots_directory.mkdir(mode=0o711)
        shutil.copyfile(init.__file__, slots_directory / "init.py")
        compiled = isolation != "none" and compile_init.works(compile_init.LIBRARY)
        if compiled:
            shutil.copy(compile_init.LIBRARY, slots_directory / compile_init.LIBRARY.name)
        trees = list(dict.fromkeys([str(slots_directory), *shown]))
        if os.geteuid() == 0:
            shared_trees = SharedTrees.mounted(trees, data_dir / "stage", keep=[str(data_dir), *keep])
        else:
            shared_trees = SharedTrees.plain(trees)
        return cls(
            isolation=isolation,
            slots_directory=slots_directory,
            shared_trees=shared_trees,
            groups=groups,
            shown=tuple(trees[1:]),
            prefix=prefix,
            compiled_init=compiled,
            required=tuple(required),
            policy=policy,
            bubblewrap=bubblewrap,
            options=options,
            seccomp_filter=None if isolation == "none" else seccomp.filter_of_this_machine(),
        )

    def with_memory(self, memory_bytes: int) -> Blueprint:
        """The same for slots with another memory limit."""
        limits = replace(self.groups.limits, memory_bytes=memory_bytes)
        return replace(self, groups=replace(self.groups, limits=limits))

    def make_slot(self, index: int) -> tuple[SlotDirectory, SlotDirectory]:
        """Make the two directories of a slot, and the files that describe its user."""
        files = self.slots_directory / f"slot_{index}"
        files.mkdir(mode=0o711)
        uid = FIRST_SLOT_UID + index if os.geteuid() == 0 else None
        shown_uid, shown_gid = (uid, uid) if uid is not None else (os.getuid(), os.getgid())
        (files / "passwd").write_text(
            f"root:x:0:0:root:/root:/usr/sbin/nologin\nuser:x:{shown_uid}:{shown_gid}:user:{HOME}:/bin/sh\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        )
        (files / "group").write_text(f"root:x:0:\nuser:x:{shown_gid}:\nnogroup:x:65534:\n")
        (files / "hosts").write_text(f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost ip6-localhost\n")
        for name in ("passwd", "group", "hosts"):
            (files / name).chmod(0o644)
        return self._slot_directory(files, "front", uid, index), self._slot_directory(files, "back", uid, index)

    def _slot_directory(self, files: Path, name: str, uid: int | None, index: int) -> SlotDirectory:
        (files / name).mkdir(mode=0o711)
        root = Path(self.shared_path(files / name))
        seen_as = WORKSPACE if self.isolation == "bubblewrap" else f"{root}{WORKSPACE}"
        return SlotDirectory(files, root, uid, seen_as, self.groups.slot(index))

    def argv(self, directory: SlotDirectory, *, control: int, output: int, seccomp_filter: int | None) -> list[str]:
        """The command line of a box around the workspace of a slot directory.

        The descriptors that the box inherits: `control` and `output` for its init, and the file of the seccomp filter.
        """
        limits = ",".join(f"{getattr(resource, f'RLIMIT_{name}')}:{value}" for name, value in self.process_limits.items())
        init = ["-I", "-S", INIT_IN_BOX, str(control), str(output), limits]
        if self.isolation == "none":
            init[2] = self.shared_path(self.slots_directory / "init.py")
            interpreter = os.path.realpath(sys.executable)
            if self.prefix in self.shown:
                interpreter = self.shared_trees.path(self.prefix) + interpreter.removeprefix(self.prefix)
            return [*_become(directory.uid), interpreter, *init]
        box = [*_become(directory.uid), self.bubblewrap, *self._box_options(directory)]
        if seccomp_filter is not None:
            box += ["--seccomp", str(seccomp_filter)]
        if self.compiled_init:
            # `ps` shows the running command here, as far as there is room.
            arguments = f"{control} {output} {limits}".ljust(_SHOWN_COMMAND_CHARACTERS)
            return [*box, "--setenv", "LD_PRELOAD", COMPILED_INIT_IN_BOX, "--", "/bin/sh", "-c", arguments]
        return [*box, "--", os.path.realpath(sys.executable), *init]

    @property
    def process_limits(self) -> dict[str, int]:
        """Resource limits (`RLIMIT_*`) of every process in a box; NPROC counts the processes of the slot's user together."""
        limits = {**PROCESS_LIMITS, "NPROC": self.groups.limits.processes}
        if "memory" in self.groups.missing:
            # Not the address space (AS): some runtimes reserve far more of it than they use.
            limits["DATA"] = self.groups.limits.memory_bytes
        return limits

    @property
    def tmpfs_bytes(self) -> dict[str, int]:
        """The sizes of the directories of `TMPFS_BYTES`: files in memory, which no kill frees, never use up a slot's memory."""
        # The workspace may use half of it.
        share = min(1.0, 0.45 * self.groups.limits.memory_bytes / sum(TMPFS_BYTES.values()))
        return {path: int(size * share) for path, size in TMPFS_BYTES.items()}

    def shared_path(self, path: Path) -> str:
        """A path below `slots_directory` as the user of a slot reaches it."""
        return f"{self.shared_trees.path(str(self.slots_directory))}/{path.relative_to(self.slots_directory)}"

    def environment(self, directory: SlotDirectory, *, network: bool) -> dict[str, str]:
        """The whole environment of a command, without what a call adds."""
        path = _SYSTEM_PATH
        if self.prefix in self.shown:
            visible = self.prefix if self.isolation == "bubblewrap" else self.shared_trees.path(self.prefix)
            path = f"{visible}/bin:{path}"
        return {
            "PATH": path,
            "HOME": HOME if self.isolation == "bubblewrap" else directory.seen_as,
            "USER": "user",
            "LOGNAME": "user",
            "SHELL": "/bin/sh",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            **(ENVIRONMENT if network and self.isolation == "bubblewrap" else {}),
        }

    def limits(self) -> dict[str, Any]:
        """The limits that are enforced, for `/health`."""
        enforced: dict[str, Any] = {f"rlimit_{name.lower()}": value for name, value in self.process_limits.items()}
        enforced["cgroups"] = self.groups.versions
        if "memory" in self.groups.versions:
            enforced["memory_bytes"] = self.groups.limits.memory_bytes
        if self.isolation == "none":
            return enforced
        enforced["compiled_init"] = self.compiled_init
        enforced["tmpfs_bytes"] = self.tmpfs_bytes
        enforced["seccomp"] = self.seccomp_filter is not None
        enforced["nested_user_namespaces"] = "--disable-userns" not in self.options
        return enforced

    def _box_options(self, directory: SlotDirectory) -> list[str]:
        argv = ["--unshare-user"]
        if "--disable-userns" in self.options:
            argv.append("--disable-userns")
        argv += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        argv += ["--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--hostname", HOSTNAME]
        argv += ["--ro-bind", "/usr", "/usr"]
        for name in _MERGED_DIRECTORIES:
            if os.path.islink(f"/{name}"):
                argv += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                argv += ["--ro-bind", f"/{name}", f"/{name}"]
        argv += ["--proc", "/proc", "--dev", "/dev"]
        for path, size in self.tmpfs_bytes.items():
            argv += ["--size", str(size), "--perms", "1777" if path in ("/tmp", "/dev/shm") else "0755", "--tmpfs", path]
        for path in _ETC:
            argv += ["--ro-bind-try", path, path]
        for name in ("passwd", "group", "hosts"):
            argv += ["--ro-bind", self.shared_path(directory.files / name), f"/etc/{name}"]
        init = (compile_init.LIBRARY.name, COMPILED_INIT_IN_BOX) if self.compiled_init else ("init.py", INIT_IN_BOX)
        argv += ["--ro-bind", self.shared_path(self.slots_directory / init[0]), init[1]]
        for path in self.shown:
            argv += ["--ro-bind", self.shared_trees.path(path), path]
        argv += ["--bind", str(directory.workspace), WORKSPACE, "--remount-ro", "/dev", "--remount-ro", "/"]
        return [*argv, "--chdir", WORKSPACE]


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")


def _check_shown(path: str) -> str:
    if not os.path.isabs(path):
        raise StartupError(f"--read-only {path}: must be an absolute path")
    path = os.path.normpath(path)
    if path == "/" or any(_is_below(path, reserved) or _is_below(reserved, path) for reserved in _RESERVED):
        raise StartupError(f"--read-only {path}: boxes have their own {path}")
    if not os.path.exists(path):
        raise StartupError(f"--read-only {path}: no such file or directory")
    return path


def _become(uid: int | None) -> list[str]:
    """The beginning of a command line that runs as a slot's user.

    A program changes the user: subprocess would have to fork the whole interpreter for that, which takes milliseconds.
    """
    return [] if uid is None else [_SETPRIV, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


def _find_bubblewrap() -> tuple[str, frozenset[str]]:
    program = shutil.which("bwrap")
    if program is None:
        raise StartupError(
            "bubblewrap is not installed; install it (Debian, Ubuntu: apt-get install bubblewrap) or run with --isolation none"
        )
    usage = subprocess.run([program, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    options = frozenset(word for word in usage.stdout.split() if word.startswith("--"))
    missing = [option for option in _NEEDED_OPTIONS if option not in options]
    if missing:
        raise StartupError(
            f"{program} is too old: it has no {missing[0]}; install bubblewrap 0.8 or newer, or run with --isolation none"
        )
    return program, options
