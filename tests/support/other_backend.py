"""A backend as another package may have one, with options of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from backends import BackendConfigError, LocalBackend, LocalOptions, PoolOptions


class OtherOptions(LocalOptions):
    """Options of this backend."""

    other_file: str = Field("", description="Where it writes down that it was started.")
    other_words: list[str] = Field(["started"], description="What it writes.")


class OtherBackend(LocalBackend):
    """The local one; it leaves a trace."""

    options_class: ClassVar[type[PoolOptions]] = OtherOptions
    options: OtherOptions

    async def start(self) -> None:
        """Write it down, and start.

        Raises:
            BackendConfigError: nobody has said where.
        """
        if not self.options.other_file:
            raise BackendConfigError("other_file: none is named")
        await asyncio.to_thread(Path(self.options.other_file).write_text, " ".join(self.options.other_words))
        await super().start()
