"""Options from environment variables, which are passed in: a program's `main` is the one place that reads its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from hermes_envs.errors import ConfigError


class VariableOptions(BaseSettings):
    """Options of which each has a variable: its name in capitals, after the `env_prefix` of the class' `model_config`."""

    model_config = SettingsConfigDict(extra="forbid", enable_decoding=False)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The constructor's arguments alone: nothing is read from the process' environment behind its back."""
        return (init_settings,)

    @classmethod
    def from_variables(
        cls, variables: Mapping[str, str], aliases: Mapping[str, str] = MappingProxyType({}), **overrides: Any
    ) -> Self:
        """The options that `variables` set, where `overrides` do not; an empty variable counts as not set.

        `aliases` maps further variables to those that they stand for, over which they win.

        Raises:
            ConfigError: a value is not what its option takes; the message names the variable, or else the option.
        """
        given = {variable: value for variable, value in variables.items() if value}
        names = {variable.lower(): variable for variable in given}
        names |= {variable.lower(): alias for alias, variable in aliases.items() if alias in given}
        source = EnvSettingsSource(cls)
        source.env_vars = {name: given[variable] for name, variable in names.items()}
        try:
            return cls(**source() | overrides)
        except ValidationError as reason:
            error = reason.errors()[0]
            message = error["msg"].removeprefix("Value error, ")
            if not error["loc"]:
                raise ConfigError(message) from reason
            option = str(error["loc"][0])
            variable = names.get(f"{source.env_prefix}{option}".lower())
            raise ConfigError(f"{variable if variable and option not in overrides else option}: {message}") from reason
