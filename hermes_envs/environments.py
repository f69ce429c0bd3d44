"""Environments by name: `python -m hermes_envs.environments NAME serve|process|evaluate ...`.

NAME is one of this package's environments, one that another package registers as an entry point of the group
`hermes_envs.environments`, or `package.module:Class`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from backends.registry import Registry
from hermes_envs.errors import ConfigError

if TYPE_CHECKING:
    from hermes_envs.env import AgentEnv

_BUILT_IN = {
    "gsm8k_agent": "hermes_envs.gsm8k_agent:Gsm8kAgentEnv",
    "simple_qa": "hermes_envs.simple_qa:SimpleQaEnv",
    "smoke": "hermes_envs.smoke:SmokeEnv",
    "swe_smith": "hermes_envs.swe_smith:SweSmithEnv",
}


def _base() -> type[AgentEnv]:
    # Takes seconds to import.
    from hermes_envs.env import AgentEnv

    return AgentEnv


ENVIRONMENTS = Registry(
    kind=_base, group="hermes_envs.environments", option="environment", built_in=_BUILT_IN, error=ConfigError
)


def main() -> None:
    """Run the command line of the environment that is named."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.stderr.write(f"{__doc__}\nerror: no environment is named; there are {', '.join(ENVIRONMENTS.names())}\n")
        sys.exit(2)
    try:
        environment = ENVIRONMENTS.load(sys.argv.pop(1))
    except ConfigError as reason:
        sys.exit(f"error: {reason}")
    environment.cli()


if __name__ == "__main__":
    main()
