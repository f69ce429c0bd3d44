"""The YAML file that a trainer and its environments share: where it is, and what may stand in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from hermes_envs.errors import ConfigError

CONFIG_VARIABLE = "TINKER_CONFIG"
"""Names the file where no flag does."""
SECTIONS = ("env", "openai", "tinker", "slurm", "testing")

_PACKAGE = Path(__file__).parent.parent


def config_file(name: str) -> Path:
    """The named file, or one that ships with the package where there is no such file in the working directory."""
    # In a wheel they are inside of the package, in a checkout beside it.
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        shipped = folder / Path(name).name
        if not Path(name).exists() and shipped.is_file():
            return shipped
    return Path(name)


def read_sections(path: Path) -> Mapping[str, Any]:
    """The sections of a file, which atroposlib would answer with a traceback if they were none.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a section that means nothing.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise ConfigError(f"config: cannot read {path}: {reason.strerror}") from reason
    except (UnicodeDecodeError, yaml.YAMLError) as reason:
        raise ConfigError(f"config: {path} is not YAML: {reason}") from reason
    if not isinstance(content, Mapping):
        raise ConfigError(f"config: {path}: the file is not a mapping; expected sections {', '.join(SECTIONS)}")
    for name in content:
        if name not in SECTIONS:
            raise ConfigError(f"config: {path}: unknown section {name}; known: {', '.join(SECTIONS)}")
    return content


def mapping(path: Path, name: str, section: Any) -> Mapping[str, Any]:
    """A section, or one of several that a section has. Raises: ConfigError: it is no mapping."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"config: {path}: {name} is not a mapping")
    return section


def check_keys(path: Path, name: str, section: Any, known: Collection[str]) -> None:
    """Raises: ConfigError: a section has a key that means nothing, which atroposlib would ignore."""
    for key in mapping(path, name, section):
        if key not in known:
            raise ConfigError(f"config: {path}: unknown key {name}.{key}")
