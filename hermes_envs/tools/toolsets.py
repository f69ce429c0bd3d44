"""Named groups of tools that include each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hermes_envs.errors import ConfigError
from hermes_envs.tools.builtin import BUILTIN_TOOLS
from hermes_envs.tools.tool import Tool


@dataclass
class Toolsets:
    """The tools and toolsets that a configuration can name."""

    tools: dict[str, Tool] = field(default_factory=lambda: dict(BUILTIN_TOOLS))
    members: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
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
    )

    def register(self, name: str, members: Sequence[str], tools: Iterable[Tool] = ()) -> None:
        """Add a toolset; `members` are names of tools or of other toolsets, `tools` are new ones to know.

        Raises:
            ConfigError: the name is taken, or a member is unknown.
        """
        if name in self.members:
            raise ConfigError(f"toolset {name!r} exists already")
        known = self.tools | {tool.name: tool for tool in tools}
        for member in members:
            if member not in known and member not in self.members:
                raise ConfigError(f"toolset {name!r} names {member!r}, which is neither a tool nor a toolset")
        self.tools = known
        self.members[name] = tuple(members)

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
