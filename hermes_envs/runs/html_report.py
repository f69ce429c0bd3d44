"""The page that shows collected trajectories to a person."""

from __future__ import annotations

import html
import json
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from atroposlib.frontend.jsonl2html import generate_html

from hermes_envs.policies.base import Message


def write_html_report(groups: Path) -> Path:
    """Render a file of groups with atroposlib's page; the page lies beside the file, with the ending `.html`.

    atroposlib's generator pastes message contents into the page and shows no tool calls: contents are escaped first, and
    calls are written out.
    """
    page = groups.with_suffix(".html")
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / groups.name
        with groups.open(encoding="utf-8") as lines, shown.open("w", encoding="utf-8") as copy:
            for line in lines:
                group = json.loads(line)
                if (group.get("group_overrides") or {}).get("segment"):
                    # Further segments of trajectories that have been shown.
                    continue
                messages = [[_shown(message) for message in trajectory] for trajectory in group["messages"]]
                copy.write(json.dumps({"messages": messages, "scores": group["scores"]}) + "\n")
        # It reports to the terminal, where the run's own account is shown.
        with redirect_stdout(StringIO()):
            generate_html(str(shown), str(page))
    return page


def _shown(message: Message) -> dict[str, Any]:
    parts = [_block(message["content"])] if message.get("content") else []
    for call in message.get("tool_calls") or ():
        parts.append(_block(f"{call['function']['name']} {call['function']['arguments']}"))
    return {"role": html.escape(message["role"]), "content": "\n\n".join(parts)}


def _block(text: str) -> str:
    """Text as it is, in a page made from Markdown: neither its markup nor its lines are to be interpreted."""
    return f"<pre>{html.escape(text)}</pre>".replace("\n", "&#10;")
