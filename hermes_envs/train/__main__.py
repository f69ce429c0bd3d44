"""Trains a model on the groups that environments send to atroposlib's `run-api`, through a Tinker service.

    run-api &
    TINKER_API_KEY=... python -m hermes_envs.train --config FILE &
    python -m hermes_envs.ENVIRONMENT serve --config FILE

or all three at once:

    TINKER_API_KEY=... python -m hermes_envs.train --config FILE --environment ENVIRONMENT

The file has the sections env:, openai: and tinker:. TINKER_CONFIG names it where --config does not; TINKER_BASE_URL and
TINKER_API_KEY say where the Tinker service is. A run that has a checkpoint goes on from it. See docs/training.md.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hermes_envs.errors import ConfigError, HermesEnvsError
from hermes_envs.runs.config_file import CONFIG_VARIABLE, config_file
from hermes_envs.train.options import TinkerService, TrainingConfig

if TYPE_CHECKING:
    from hermes_envs.train.run import EnvironmentCommand


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hermes_envs.train",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="the YAML file; default: the variable TINKER_CONFIG")
    parser.add_argument("--environment", help="start run-api and this environment, too: its name, a module's, or module:Class")
    parser.add_argument("--num-steps", type=int, help="instead of env.total_steps")
    parser.add_argument("--base-model", help="instead of tinker.base_model")
    parser.add_argument("--lora-rank", type=int, help="instead of tinker.lora_rank")
    parser.add_argument("--learning-rate", type=float, help="instead of tinker.learning_rate")
    parser.add_argument("--no-wandb", action="store_true", help="as env.use_wandb: false")
    return parser.parse_args(arguments)


def _overrides(flags: argparse.Namespace) -> dict[str, dict[str, Any]]:
    tinker = {name: getattr(flags, name) for name in ("base_model", "lora_rank", "learning_rate")}
    env = {"total_steps": flags.num_steps, "use_wandb": False if flags.no_wandb else None}
    return {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in (("env", env), ("tinker", tinker))
    }


def _prepare(arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[TrainingConfig, EnvironmentCommand | None]:
    flags = _parse(arguments)
    named = flags.config or variables.get(CONFIG_VARIABLE)
    if not named:
        raise ConfigError(f"config: name a file with --config, or in the variable {CONFIG_VARIABLE}")
    path = config_file(named)
    overrides = _overrides(flags)
    config = TrainingConfig.load(path, overrides)
    if flags.environment is None:
        return config, None
    # Takes seconds to import.
    from hermes_envs.train.run import EnvironmentCommand

    config.check_endpoints()
    for_environment = [part for name, value in overrides["env"].items() for part in (f"--env.{name}", str(value).lower())]
    return config, EnvironmentCommand.of(flags.environment, path, tuple(for_environment))


def main() -> int:
    """Train; the exit status is 0 only if all steps were done."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("hermes_envs.train").setLevel(logging.INFO)
    try:
        config, environment = _prepare(sys.argv[1:], os.environ)
        service = TinkerService.from_variables(os.environ)
        from hermes_envs.train.run import run

        complete = asyncio.run(run(config, service, environment))
    except HermesEnvsError as reason:
        sys.stderr.write(f"error: {reason}\n")
        return 1
    sys.stderr.write(f"{'complete' if complete else 'interrupted'}: {config.tinker.run_folder}\n")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
