"""Backends and environments by name: the built-in ones, and those of other packages."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import Field

from backends import (
    BACKENDS,
    BackendConfigError,
    BackendOptions,
    LocalBackend,
    PoolOptions,
    create_tool_backend,
    options_with,
)
from backends.no_sandbox import NoSandbox
from backends.registry import Registry
from hermes_envs.environments import ENVIRONMENTS

ROOT = Path(__file__).parent.parent.parent


class ElsewhereOptions(PoolOptions):
    """Options of a backend from another package."""

    elsewhere_rooms: int = Field(3, ge=1)
    acquire_timeout_s: float = 7.0


class Elsewhere(NoSandbox):
    """A backend from another package."""

    options_class = ElsewhereOptions

    def __init__(self, options: ElsewhereOptions) -> None:
        super().__init__()
        self.rooms = options.elsewhere_rooms


NAME = f"{__name__}:Elsewhere"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that registers `Elsewhere`, and tries to take the name of a built-in backend."""
    metadata = tmp_path / "elsewhere-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[hermes_envs.backends]\nelsewhere = {NAME}\nlocal = {NAME}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("registry", [BACKENDS, ENVIRONMENTS], ids=["backends", "environments"])
def test_what_is_built_in_is_registered_like_any_other(registry: Registry[object]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry.group] == registry.built_in
    for name in registry.built_in:
        assert registry.load(name).__name__ == registry.built_in[name].partition(":")[2]


@pytest.mark.usefixtures("installed")
def test_a_package_registers_a_backend() -> None:
    assert BACKENDS.names() == ["elsewhere", "local"]
    assert BACKENDS.load("elsewhere") is BACKENDS.load(NAME)
    assert BACKENDS.load("local") is LocalBackend
    with pytest.raises(BackendConfigError, match=r"^tool_pool_mode: 'cloud' is not available.*: elsewhere, local$"):
        BACKENDS.load("cloud")


def test_a_backend_from_elsewhere_has_options_of_its_own() -> None:
    options = options_with(BackendOptions, NAME)(tool_pool_mode=NAME, elsewhere_rooms=5)
    assert isinstance(options, BackendOptions)
    backend = create_tool_backend(options)
    assert (type(backend).__name__, backend.rooms) == ("Elsewhere", 5)  # type: ignore[attr-defined]
    # What all backends have in common is said by whoever chooses one.
    assert options.acquire_timeout_s == BackendOptions().acquire_timeout_s
    with pytest.raises(ValueError, match="elsewhere_room\n"):
        options_with(BackendOptions, NAME)(elsewhere_room=5)


def test_options_are_extended_only_where_something_is_missing() -> None:
    assert options_with(BackendOptions, "local") is BackendOptions
    extended = options_with(BackendOptions, NAME)
    assert options_with(extended, NAME) is extended
    assert (extended.__name__, extended.__doc__) == (BackendOptions.__name__, BackendOptions.__doc__)


def test_options_that_lack_those_of_the_backend_are_refused() -> None:
    with pytest.raises(BackendConfigError, match="ElsewhereOptions, which BackendOptions lacks"):
        create_tool_backend(BackendOptions(tool_pool_mode=NAME))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.at_all:Backend", "cannot be imported: No module named 'nowhere'"),
        ("backends.local:Missing", "cannot be imported: .*Missing"),
        ("backends.local:LocalOptions", "is no subclass of ToolBackend"),
        ("backends.local:RESTARTS_IN_A_ROW", "is no subclass of ToolBackend"),
        ("backends.local", "is not available in this version; available: local"),
        ("", "is not available in this version; available: local"),
        (":", "cannot be imported"),
        ("backends.local:", "cannot be imported"),
    ],
)
def test_names_that_mean_nothing(name: str, reason: str) -> None:
    with pytest.raises(BackendConfigError, match=f"^tool_pool_mode: '{name}' {reason}") as caught:
        create_tool_backend(BackendOptions(tool_pool_mode=name))
    assert "\n" not in str(caught.value)
