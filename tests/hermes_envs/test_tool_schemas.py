"""What a model is shown of the built-in tools."""

from __future__ import annotations

import json
from pathlib import Path

from hermes_envs.tools.toolsets import Toolsets

SHOWN = Path(__file__).parent.parent / "data" / "tool_schemas.json"


def test_a_model_is_shown_these_words_in_this_order() -> None:
    """A prompt of a trained model has these characters: change them on purpose or not at all."""
    shown = [tool.schema["function"] for tool in Toolsets().tools.values()]
    assert json.dumps(shown, indent=1) + "\n" == SHOWN.read_text(encoding="utf-8")
