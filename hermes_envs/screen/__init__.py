"""What a terminal shows, from its recording."""

from __future__ import annotations

from hermes_envs.screen.decoder import AsciinemaStreamDecoder

__all__ = ["AsciinemaStreamDecoder"]
