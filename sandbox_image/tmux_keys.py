"""Which texts are names of keys, as tmux has them (tmux(1), "KEY BINDINGS"); all others are typed as they are."""

from __future__ import annotations

import re

_NAMED = (
    "F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 F11 F12 IC Insert DC Delete Home End NPage PageDown PgDn PPage PageUp PgUp Tab BTab Space "
    "BSpace Enter Escape Up Down Left Right KP/ KP* KP- KP7 KP8 KP9 KP+ KP4 KP5 KP6 KP1 KP2 KP3 KPEnter KP0 KP."
)
_KEY = re.compile(
    rf"(?:[CMS]-)*(?:{'|'.join(map(re.escape, _NAMED.split()))})|(?:[CMS]-)+[!-~]|\^[@-~]", re.IGNORECASE | re.ASCII
)


def is_key_name(text: str) -> bool:
    """Whether tmux takes this for a key: `Enter`, `C-c`, `M-x`, `S-Up`, `^d`. Upper and lower case are the same to it."""
    return _KEY.fullmatch(text) is not None
