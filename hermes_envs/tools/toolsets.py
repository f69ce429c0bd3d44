"""Named groups of tools that include each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from hermes_envs.errors import ConfigError
from hermes_envs.tools.builtin import BUILTIN_TOOLS
from hermes_envs.tools.tool import Tool

_MEMBERS = {
    "terminal": ("terminal",),
    "bash": ("bash",),
    "filesystem": ("read_file", "write_file"),
    "terminal_stateful": ("terminal_stateful",),
    "bash_stateful": ("bash_stateful",),
    "python": ("python",),
    "tmux": ("tmux",),
    "sandbox": ("terminal", "filesystem", "terminal_stateful", "tmux"),
    "default": ("terminal", "filesystem"),
    "full": ("sandbox",),
}


@dataclass(frozen=True)
class Toolsets:
    """The tools and toolsets that a configuration can name. Immutable: `register` makes new ones.

    `members` has, for each toolset, the names of its tools and of the toolsets that it includes.
    """

    tools: Mapping[str, Tool] = field(default_factory=lambda: BUILTIN_TOOLS)
    members: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _MEMBERS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", MappingProxyType(dict(self.tools)))
        object.__setattr__(self, "members", MappingProxyType(dict(self.members)))

    def register(self, name: str, *, tools: Sequence[Tool] = (), includes: Sequence[str] = ()) -> Toolsets:
        """These toolsets and one more, of new tools and of tools and toolsets that there are already.

            class MyEnv(AgentEnv):
                toolsets = AgentEnv.toolsets.register("mine", tools=[MY_TOOL], includes=["filesystem"])

        Raises:
            ConfigError: the name is taken, or `includes` has an unknown one.
        """
        if name in self.members:
            raise ConfigError(f"toolset {name!r} exists already")
        for included in includes:
            if included not in self.tools and included not in self.members:
                raise ConfigError(f"toolset {name!r} includes {included!r}, which is neither a tool nor a toolset")
        new = {tool.name: tool for tool in tools}
        return Toolsets({**self.tools, **new}, {**self.members, name: (*new, *includes)})

    def resolve(self, enabled: Sequence[str], disabled: Sequence[str] = ()) -> dict[str, Tool]:
        """The tools of the enabled toolsets less those of the disabled ones, by name, in a stable order.

        Raises:
            ConfigError: a name is unknown.
        """
        without = set(self._expand("disabled_toolsets", disabled))
        return {name: self.tools[name] for name in self._expand("enabled_toolsets", enabled) if name not in without}

    def _expand(self, option: str, names: Sequence[str]) -> list[str]:
        expanded: dict[str, None] = {}
        pending, seen = list(names), set()
        while pending:
            name = pending.pop(0)
            if name not in self.members:
                raise ConfigError(f"{option}: unknown toolset {name!r}; known: {', '.join(sorted(self.members))}")
            if name in seen:
                continue
            seen.add(name)
            for member in self.members[name]:
                # A toolset may bear the name of its only tool: then the name means the tool.
                if member in self.tools:
                    expanded[member] = None
                else:
                    pending.append(member)
        return list(expanded)
