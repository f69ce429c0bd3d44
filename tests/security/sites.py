"""Where attacks take place: in a slot, and at the places that lack one of its defences."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.sandbox_image.running import Api
from tests.security import naive
from tests.security.attack import Ask, Attack, Outcome
from tests.security.field import Field, become
from tests.support.waiting import PATIENCE_S

_ARGUMENTS = {
    **dict.fromkeys(
        ("cap-drop", "hostname", "proc", "dev", "size", "perms", "tmpfs", "remount-ro", "chdir", "dir", "seccomp"), 1
    ),
    **dict.fromkeys(("ro-bind", "ro-bind-try", "bind", "bind-try", "dev-bind", "symlink", "setenv", "chmod"), 2),
}
"""How many arguments options of bubblewrap take, for those that take any."""
_FILTER_FD = "9"


async def _run(command: list[str], attack: Attack, field: Field, environment: dict[str, str]) -> Outcome:
    start = time.monotonic()
    token = secrets.token_hex(16)
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd="/",
        env={**environment, "ATTACK": token},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    output = bytearray()

    async def collect() -> None:
        assert process.stdout is not None
        while chunk := await process.stdout.read(65536):
            output.extend(chunk)

    ending = asyncio.gather(collect(), process.wait())
    done, _ = await asyncio.wait([ending], timeout=attack.control_s or attack.timeout_s)
    if not done:
        _kill_all(token)
        await ending
    return Outcome(output.decode(errors="replace"), process.returncode, time.monotonic() - start, field, expired=not done)


def _kill_all(token: str) -> None:
    """Kill the processes with this in their environment, wherever they have gone."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if token.encode() in Path(f"/proc/{name}/environ").read_bytes():
                os.kill(int(name), signal.SIGKILL)


@dataclass(frozen=True)
class InSlot:
    """In a slot of a server, over its API."""

    slot: str = "slot_0"
    network: bool = False
    variables: tuple[tuple[str, str], ...] = ()
    needs_root: bool = False

    async def strike(self, attack: Attack, field: Field) -> Outcome:
        """Start from an empty workspace, run the script, and ask what is to be asked."""
        api = Api.over(field.server)
        api.slot = self.slot
        async with api.session:
            await api.reset(network=self.network)
            return await strike_over(api, attack, field, dict(self.variables))


async def strike_over(api: Api, attack: Attack, field: Field, variables: Mapping[str, str] = MappingProxyType({})) -> Outcome:
    """Run an attack in a slot as it is."""
    start = time.monotonic()
    call = {"slot_id": api.slot, "tool": "bash", "args": {"command": attack.script, "env": {**field.variables(), **variables}}}
    text, exit_code, expired = "", None, False
    try:
        async with asyncio.timeout(attack.timeout_s + PATIENCE_S):
            status, result = await api.post("/execute", {**call, "timeout": attack.timeout_s})
            text = json.dumps(result, ensure_ascii=False)
            if status == 200:
                text, exit_code = result["output"], result["metadata"].get("exit_code")
            if attack.ask is not None:
                text += await _ask(api, attack.ask, field)
    except TimeoutError:
        expired = True
    return Outcome(text, exit_code, time.monotonic() - start, field, expired)


async def _ask(api: Api, ask: Ask, field: Field) -> str:
    arguments = _filled(ask, field)
    if not ask.what.startswith("/"):
        status, answer = await api.post("/execute", {"slot_id": api.slot, "tool": ask.what, "args": arguments})
        assert status == 200, answer
        return str(answer["output"])
    status, answer = await api.post(ask.what, {"slot_id": api.slot, **arguments})
    assert status < 500, answer
    if ask.what == "/artifacts/archive" and status == 200:
        return naive.unpacked(base64.b64decode(answer["content"]))
    return str(answer.get("content", answer))


def _filled(ask: Ask, field: Field) -> dict[str, Any]:
    """The arguments with `$NAME` in them replaced."""
    filled = dict(ask.arguments)
    for name, value in filled.items():
        for variable, meaning in field.variables().items():
            if isinstance(value, str):
                filled[name] = value = value.replace(f"${variable}", meaning)
    return filled


@dataclass(frozen=True)
class WithoutIsolation:
    """In a slot of a server that was told to give up isolation."""

    needs_root: bool = False

    async def strike(self, attack: Attack, field: Field) -> Outcome:
        """Run it over that server's API."""
        api = Api.over(field.unisolated())
        async with api.session:
            await api.reset()
            return await strike_over(api, attack, field)


@dataclass(frozen=True)
class Outside:
    """On the host, as the server's user or as root, where file tools are naive ones."""

    needs_root: bool = False
    limits: tuple[str, ...] = ()
    """`ulimit` options that keep the machine well."""
    directory: Path | None = None
    """Where; None is a new directory."""

    async def strike(self, attack: Attack, field: Field) -> Outcome:
        """Run it in an empty directory."""
        user = 0 if self.needs_root else os.stat(f"/proc/{field.server.process.pid}").st_uid
        enter = field.become_server_user()
        if self.needs_root:
            enter = enter[:2]
        _, environment, _ = field.box()
        directory = self.directory or field.new_directory(user)
        limits = "".join(f"ulimit {option} && " for option in self.limits)
        script = f'cd "$1" && {limits}exec sh -c "$2"'
        command = [*enter, "sh", "-c", script, "sh", str(directory), attack.script]
        variables = {**environment, **field.variables(), "HOME": str(field.grounds / "home")}
        outcome = await _run(command, attack, field, variables)
        if attack.ask is None:
            return outcome
        program = shutil.copy(naive.__file__, field.grounds / "naive.py")
        arguments = json.dumps(_filled(attack.ask, field))
        tool = ["python3", "-I", str(program), attack.ask.what, arguments]
        asked = await _run(
            [*enter, "sh", "-c", f'cd "$1" && shift && {limits}exec "$@"', "sh", str(directory), *tool],
            attack,
            field,
            variables,
        )
        expired = outcome.expired or asked.expired
        return Outcome(outcome.text + asked.text, asked.exit_code, outcome.seconds + asked.seconds, field, expired)


@dataclass(frozen=True)
class BoxWithout:
    """In a box like the server's, from its own command line, without some options and with some others.

    `missing` are options as they stand on the command line, one with an argument as `--option argument`; `with_root` keeps
    root's rights instead of becoming the slot's user.
    """

    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    with_root: bool = False
    secret_environment: bool = False

    @property
    def needs_root(self) -> bool:
        """Whether an ordinary user cannot make such a box."""
        return self.with_root

    async def strike(self, attack: Attack, field: Field) -> Outcome:
        """Run it in a box of its own."""
        assert attack.ask is None
        command, environment = self.command(field, attack.script)
        return await _run(command, attack, field, environment)

    def command(self, field: Field, script: str) -> tuple[list[str], dict[str, str]]:
        """The command line that runs a script in such a box, and its environment."""
        arguments, environment, user = field.box()
        options = _options(arguments)
        kept = [option for option in options if not _is_missing(option, self.missing)]
        assert len(kept) < len(options) or not self.missing, f"{self.missing} are not among {options}"
        workspace = ["--bind", str(field.new_directory(0 if self.with_root else user)), "/workspace"]
        placed = [workspace if option[-1] == "/workspace" and "bind" in option[0] else option for option in kept]
        # What is added must be there before the root of the box is made read-only.
        at = next((index for index, option in enumerate(placed) if option[0] == "--remount-ro"), len(placed))
        variables = [["--setenv", name, value] for name, value in field.variables().items()]
        flat = [part for option in (*placed[:at], list(self.added), *variables, *placed[at:]) for part in option]
        if self.secret_environment:
            environment = {**environment, "HIDDEN_SECRET": field.flag}
        enter = field.become_server_user()[:2]
        become_slot = [] if self.with_root or os.geteuid() != 0 else become(user)
        with_filter = ["sh", "-c", f'exec "$@" {_FILTER_FD}< "$0"', str(field.filter)]
        return [*with_filter, *enter, *become_slot, arguments[0], *flat, "--", "sh", "-c", script], environment


RIGHTS_OF_ROOT = BoxWithout(("--unshare-user", "--disable-userns", "--cap-drop", "--seccomp"), with_root=True)


def _options(arguments: list[str]) -> list[list[str]]:
    options: list[list[str]] = []
    pending = iter(arguments[1 : arguments.index("--")])
    for name in pending:
        option = [name, *(next(pending) for _ in range(_ARGUMENTS.get(name[2:], 0)))]
        if option[0] == "--seccomp":
            option[1] = _FILTER_FD
        # What makes the init the init.
        if name != "--as-pid-1" and option[1:2] != ["LD_PRELOAD"]:
            options.append(option)
    return options


def _is_missing(option: list[str], missing: tuple[str, ...]) -> bool:
    return option[0] in missing or " ".join(option) in missing
