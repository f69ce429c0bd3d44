"""A small external tool, to try a tool server with: what it answers cannot be guessed and can be checked."""

from __future__ import annotations

import hashlib

from hermes_envs.tools.external import ExternalTool


async def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


SHA256 = ExternalTool(
    "sha256",
    "Return the SHA-256 digest of a text as 64 hexadecimal digits.",
    {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
        "additionalProperties": False,
    },
    _sha256,
    timeout_s=10.0,
)
TOOLS = (SHA256,)
