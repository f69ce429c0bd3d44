"""hermes-agent's TERMINAL_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from backends import BackendOptions, options_with
from hermes_envs.agent_programs.pool import TerminalPool
from hermes_envs.agent_programs.terminal import Terminal
from hermes_envs.services.variables import VariableOptions


class TerminalOptions(VariableOptions, BackendOptions):
    """Options of a terminal, and of the backend that its slot comes from."""

    model_config = SettingsConfigDict(env_prefix="TERMINAL_")

    cwd: str = Field("", description="Directory of commands, absolute or relative to the workspace.")
    timeout: float = Field(60.0, gt=0, description="Longest that a command may take, in seconds.")


def terminal_from_variables(task_id: str = "", variables: Mapping[str, str] | None = None) -> Terminal:
    """A terminal as `variables` (the process' own unless given) want it; terminals that want the same slots share a backend.

    `TERMINAL_ENV` names the backend, or is `slot_pool`: then `TERMINAL_SLOT_BACKEND` names it. Other variables that are no
    options here are ignored, since hermes-agent keeps those of all backends and its own in one file.

    Raises:
        ConfigError: a variable has a value that its option does not take; the message names it.
        SandboxError: this version does not have the backend, or it does not start.
    """
    given = os.environ if variables is None else variables
    chooser = "TERMINAL_SLOT_BACKEND" if given.get("TERMINAL_ENV") == "slot_pool" else "TERMINAL_ENV"
    mode = given.get(chooser) or given.get("TERMINAL_TOOL_POOL_MODE") or TerminalOptions.model_fields["tool_pool_mode"].default
    options = options_with(TerminalOptions, mode).from_variables(given, {chooser: "TERMINAL_TOOL_POOL_MODE"})
    return Terminal(TerminalPool.shared(options), task_id=task_id, cwd=options.cwd, timeout_s=options.timeout)
