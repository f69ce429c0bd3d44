"""Runs an environment's command line so that what a user can get wrong is told in one line."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from pydantic import ValidationError
from pydantic_cli import run_and_exit
from pydantic_cli.argparse import FailedExecutionException

from backends import BackendOptions, options_with
from backends.errors import SandboxError
from hermes_envs.errors import ConfigError, HermesEnvsError
from hermes_envs.runs.atropos import allow_local_endpoints, hide_api_keys
from hermes_envs.runs.config_file import CONFIG_VARIABLE, check_keys, config_file, read_sections

_FOREIGN_OPENAI_KEYS = frozenset({"weight"})
"""What a Tinker trainer reads from the same file."""

Options = TypeVar("Options", bound=BackendOptions)


def run(commands: Mapping[str, Callable[[type[Options]], type]], options: type[Options], description: str) -> None:
    """Run one of atroposlib's commands and exit with its status: 1 for an error, 2 for a wrong flag.

    `options` is what may stand below `env:` in a file, beside the options of the backend that is chosen; from all of these
    `commands` makes the model of each command's flags.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    # Its modules set themselves to DEBUG, and say of each group what our own account says.
    logging.getLogger("atroposlib.envs.base").setLevel(logging.WARNING)
    hide_api_keys()
    allow_local_endpoints()
    _require_command(sys.argv[1:], list(commands))
    arguments = _add_config(_attach_negative_numbers(sys.argv[1:]), os.environ.get(CONFIG_VARIABLE, ""))
    sys.argv[1:] = _locate_config(arguments)
    try:
        path, sections = _read_config_file(sys.argv[1:])
        options = options_with(options, _chosen_backend(options, sys.argv[1:], sections))
        _check_config_file(path, sections, options)
        flags = {name: make(options) for name, make in commands.items()}
        run_and_exit(flags, description=description, exception_handler=_explain)
    except (ConfigError, SandboxError) as reason:
        sys.exit(_explain(reason))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("interrupted")


def set_log_level(level: str) -> None:
    """Log this package and the backends from that level on."""
    for name in ("hermes_envs", "backends"):
        logging.getLogger(name).setLevel(level.upper())


def _require_command(arguments: Sequence[str], commands: Sequence[str]) -> None:
    """Exit with a line of usage where atroposlib would end in a traceback."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "-v", "--version")):
        sys.stderr.write(f"usage: {_program()} {{{','.join(commands)}}} [--config FILE] [--env.OPTION VALUE ...]\n")
        sys.stderr.write("error: no command is given; --help says more\n")
        sys.exit(2)


def _program() -> str:
    main = sys.modules["__main__"].__spec__
    return f"python -m {main.name}" if main is not None else Path(sys.argv[0]).name


def _explain(reason: BaseException) -> int:
    if isinstance(reason, FailedExecutionException):
        sys.stderr.write(f"error: {reason.message.split('error: ')[-1].strip()}\n")
        return 2
    for line in _lines(reason):
        sys.stderr.write(f"error: {line}\n")
    return 1


def _lines(reason: BaseException) -> Sequence[str]:
    if isinstance(reason, BaseExceptionGroup):
        return [line for member in reason.exceptions for line in _lines(member)][:1]
    if isinstance(reason, ValidationError):
        return [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in reason.errors()]
    if isinstance(reason, (HermesEnvsError, SandboxError)):
        return [" ".join(str(reason).split())]
    raise reason


def _attach_negative_numbers(arguments: Sequence[str]) -> list[str]:
    """`--flag -1` becomes `--flag=-1`: atroposlib takes the first for a flag without a value, which it reads as 1."""
    attached: list[str] = []
    for argument in arguments:
        if re.fullmatch(r"-\d[\d.]*", argument) and attached and re.fullmatch(r"--[^=]+", attached[-1]):
            attached[-1] += f"={argument}"
        else:
            attached.append(argument)
    return attached


def _add_config(arguments: Sequence[str], config: str) -> list[str]:
    """Serve with the trainer's file where none is given."""
    is_given = any(argument.split("=", 1)[0] == "--config" for argument in arguments)
    if config and not is_given and arguments[:1] == ["serve"]:
        return [*arguments, "--config", config]
    return list(arguments)


def _read_config_file(arguments: Sequence[str]) -> tuple[Path, Mapping[str, Any]]:
    """The file that `--config` names and its sections; without a file there are none.

    Raises:
        ConfigError: the file cannot be read, or has other sections.
    """
    if "--config" not in arguments[:-1]:
        return Path(), {}
    path = Path(arguments[arguments.index("--config") + 1])
    return path, read_sections(path)


def _chosen_backend(options: type[BackendOptions], arguments: Sequence[str], sections: Mapping[str, Any]) -> str:
    """What `tool_pool_mode` is going to be; asked before the flags are parsed, since the backend may have flags of its own."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--env.tool_pool_mode", dest="mode", nargs="?")
    env = sections.get("env")
    given = flags.parse_known_args(arguments)[0].mode or (env.get("tool_pool_mode") if isinstance(env, Mapping) else None)
    return str(given or options.model_fields["tool_pool_mode"].default)


def _check_config_file(path: Path, sections: Mapping[str, Any], options: type[BackendOptions]) -> None:
    """Reject keys that atroposlib would ignore or answer with a traceback.

    Raises:
        ConfigError: there is no such key.
    """
    check_keys(path, "env", sections.get("env") or {}, options.model_fields)
    servers = sections.get("openai") or []
    for server in [servers] if isinstance(servers, Mapping) else servers:
        check_keys(path, "openai", server, {*APIServerConfig.model_fields, *_FOREIGN_OPENAI_KEYS})


def _locate_config(arguments: Sequence[str]) -> list[str]:
    located = [
        part for argument in arguments for part in (argument.split("=", 1) if argument.startswith("--config=") else [argument])
    ]
    if "--config" in located[:-1]:
        position = located.index("--config") + 1
        located[position] = str(config_file(located[position]))
    return located
