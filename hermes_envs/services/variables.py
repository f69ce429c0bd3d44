"""Options from text: names in a list, and environment variables, which are given, so that one place reads the process' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hermes_envs.errors import ConfigError

Options = TypeVar("Options", bound=BaseModel)


def read_options(kind: type[Options], fields: Mapping[str, str], given: Mapping[str, str], **values: str) -> Options:
    """Options of a kind: `fields` names the field that each variable sets, `given` has the variables, `values` come on top.

    A variable that is empty counts as not set.

    Raises:
        ConfigError: a value is not what its field takes, or there is no such field; the message names the variable.
    """
    variables = {field: variable for variable, field in fields.items() if given.get(variable)}
    try:
        return kind.model_validate({field: given[variable] for field, variable in variables.items()} | values)
    except ValidationError as reason:
        error = reason.errors()[0]
        if not error["loc"]:
            raise ConfigError(error["msg"].removeprefix("Value error, ")) from reason
        field = str(error["loc"][0])
        problem = "there is no such option in this version" if error["type"] == "extra_forbidden" else error["msg"]
        raise ConfigError(f"{variables.get(field, field)}: {problem}") from reason
