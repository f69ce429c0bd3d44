"""hermes-agent's TERMINAL_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from backends import BackendOptions
from hermes_envs.agent_programs.pool import TerminalPool
from hermes_envs.agent_programs.terminal import Terminal
from hermes_envs.errors import ConfigError
from hermes_envs.services.variables import read_options

_EVERY_BACKEND = {
    "TERMINAL_ACQUIRE_TIMEOUT_S": "acquire_timeout_s",
    "TERMINAL_ALLOW_NETWORK": "allow_network",
    "TERMINAL_REQUIRE_SANDBOX": "require_sandbox",
}
_ONE_BACKEND = {
    "local": {
        "TERMINAL_LOCAL_SLOTS": "local_slots",
        "TERMINAL_LOCAL_ISOLATION": "local_isolation",
        "TERMINAL_LOCAL_DATA_DIR": "local_data_dir",
    },
    "docker": {"TERMINAL_DOCKER_IMAGE": "sandbox_image"},
    "nomad": {
        "TERMINAL_NOMAD_ADDRESS": "nomad_address",
        "TERMINAL_NOMAD_JOB_ID": "sandbox_job_id",
        "TERMINAL_NOMAD_IMAGE": "sandbox_image",
        "TERMINAL_NOMAD_DRIVER": "driver",
        "TERMINAL_NOMAD_SLOTS": "slots_per_container",
        "TERMINAL_NOMAD_MIN": "min_containers",
        "TERMINAL_NOMAD_MAX": "max_containers",
        "TERMINAL_NOMAD_AUTOSTART": "nomad_autostart",
    },
    "modal": {
        "TERMINAL_MODAL_IMAGE": "modal_image",
        "TERMINAL_MODAL_GPU": "modal_gpu",
        "TERMINAL_MODAL_CPU": "modal_cpu",
        "TERMINAL_MODAL_MEMORY": "modal_memory",
        "TERMINAL_MODAL_SLOTS": "modal_slots_per_sandbox",
        "TERMINAL_MODAL_MIN": "modal_min_sandboxes",
        "TERMINAL_MODAL_MAX": "modal_max_sandboxes",
        "TERMINAL_MODAL_POOL_MAX": "modal_max_sandboxes",
        "TERMINAL_MODAL_IDLE_TIMEOUT": "modal_idle_timeout",
        "TERMINAL_MODAL_MAX_LIFETIME": "modal_max_lifetime",
        "TERMINAL_MODAL_ACQUIRE_TIMEOUT": "modal_acquire_timeout",
        "TERMINAL_MODAL_EXEC_TIMEOUT": "modal_execution_timeout",
        "TERMINAL_MODAL_WORKSPACE": "modal_workspace_base",
    },
}
"""Variable -> option. Those of a backend that is not chosen are not looked at: hermes-agent has them all in one file."""


class TerminalOptions(BaseModel):
    """Options of a terminal itself."""

    model_config = ConfigDict(extra="forbid")

    cwd: str = Field("", description="Directory of commands, absolute or relative to the workspace.")
    timeout: float = Field(60.0, gt=0, description="Longest that a command may take, in seconds.")


def terminal_from_variables(task_id: str = "", variables: Mapping[str, str] | None = None) -> Terminal:
    """A terminal as `variables` (the process' own unless given) want it; terminals that want the same slots share a backend.

    Raises:
        ConfigError: a variable cannot be honoured; the message names it.
        SandboxError: this version does not have the backend, or it does not start.
    """
    given = os.environ if variables is None else variables
    options = read_options(TerminalOptions, {"TERMINAL_CWD": "cwd", "TERMINAL_TIMEOUT": "timeout"}, given)
    pool = TerminalPool.shared(backend_options(given))
    return Terminal(pool, task_id=task_id, cwd=options.cwd, timeout_s=options.timeout)


def backend_options(given: Mapping[str, str]) -> BackendOptions:
    """Where `TERMINAL_ENV` and the variables of that backend want slots to come from.

    Raises:
        ConfigError: a variable cannot be honoured; the message names it.
    """
    mode = _mode(given)
    if mode == "modal" and given.get("TERMINAL_MODAL_MODE", "pool") != "pool":
        raise ConfigError(f"TERMINAL_MODAL_MODE: {given['TERMINAL_MODAL_MODE']!r} is not available, only 'pool' is")
    return read_options(BackendOptions, _EVERY_BACKEND | _ONE_BACKEND[mode], given, tool_pool_mode=mode)


def _mode(given: Mapping[str, str]) -> str:
    variable, wanted = "TERMINAL_ENV", given.get("TERMINAL_ENV") or "local"
    if wanted == "slot_pool":
        variable, wanted = "TERMINAL_SLOT_BACKEND", given.get("TERMINAL_SLOT_BACKEND") or "local"
    if wanted not in _ONE_BACKEND:
        known = ", ".join(_ONE_BACKEND) + (", slot_pool" if variable == "TERMINAL_ENV" else "")
        raise ConfigError(f"{variable}: {wanted!r} is not available in this version; known: {known}")
    return wanted
