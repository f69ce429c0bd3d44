"""Options of a service, from the command line and from environment variables."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from hermes_envs.errors import ConfigError
from hermes_envs.services.variables import read_options


class ServiceOptions(BaseModel):
    """Where a service listens, and who may use it."""

    model_config = ConfigDict(extra="forbid")

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
        prefix: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
    ) -> Self:
        """The options that a process was started with; ends it with status 2 if a flag makes no sense.

        `--some-option` comes before `PREFIX_SOME_OPTION`; secrets have no flag, since everybody can see those. `aliases` are
        further names of variables, without the prefix.

        Raises:
            ConfigError: a value is wrong, or a variable has the prefix and a name that means nothing.
        """
        known = {name.upper(): name for name in cls.model_fields} | dict(aliases or {})
        fields = {f"{prefix}{name}": field for name, field in known.items()}
        for variable in variables:
            if variable.startswith(prefix) and variable not in fields:
                raise ConfigError(f"{variable}: there is no such option; known: {', '.join(sorted(fields))}")
        parser = argparse.ArgumentParser(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, field in cls.model_fields.items():
            if field.annotation not in (SecretStr, SecretStr | None):
                parser.add_argument(f"--{name.replace('_', '-')}", help=(field.description or "").replace("%", "%%"))
        flags: dict[str, Any] = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
        return read_options(cls, fields, variables, **flags)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
