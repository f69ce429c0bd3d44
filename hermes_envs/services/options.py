"""Options of a service, from the command line and from environment variables."""

from __future__ import annotations

import ipaddress
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import CliSettingsSource, SettingsConfigDict

from hermes_envs.errors import ConfigError
from hermes_envs.services.variables import VariableOptions


class ServiceOptions(VariableOptions):
    """Where a service listens, and who may use it."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True)

    host: str = Field("127.0.0.1", description="Address to listen at; any but this machine's own needs a token.")
    port: int = Field(0, ge=0, le=65535, description="Port to listen at; 0 for a free one.")
    token: SecretStr | None = Field(None, min_length=1, description="What requests must carry; read from the variable alone.")
    max_request_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="Longest request that is read.")

    @model_validator(mode="after")
    def _require_a_token(self) -> Self:
        if self.token is None and not _is_loopback(self.host):
            raise ValueError(f"token: one is needed to listen at {self.host!r}, which others can reach")
        return self

    @classmethod
    def read(
        cls,
        description: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> Self:
        """The options that a process was started with: a flag, `--some-option`, wins over the option's variable.

        Ends the process with status 2 if there is no such flag. Secrets have none: everybody on the machine sees flags.

        Raises:
            ConfigError: a value is wrong, or a variable has the prefix and a name that means nothing.
        """
        prefix = cls.model_config["env_prefix"]
        known = sorted({f"{prefix}{name.upper()}" for name in cls.model_fields} | aliases.keys())
        for variable in variables:
            if variable.startswith(prefix) and variable not in known:
                raise ConfigError(f"{variable}: there is no such option; known: {', '.join(known)}")
        parser = ArgumentParser(description=description, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
        flags = CliSettingsSource[ArgumentParser](
            cls, root_parser=parser, cli_parse_args=[*arguments], add_argument_method=_add_flag
        )
        return cls.from_variables(variables, aliases, **flags())


def _add_flag(parser: ArgumentParser, *names: str, **details: Any) -> None:
    if SecretStr.__name__ not in str(details.get("metavar")):
        parser.add_argument(*names, **details)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
