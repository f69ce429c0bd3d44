"""The rows of a task folder, as they were before they were written."""

from __future__ import annotations

import json
from pathlib import Path

from hermes_envs.task_building.task_folder import TASKS_FILE, TaskRow


def read_rows(folder: Path) -> list[TaskRow]:
    """The rows that `add_rows` wrote."""
    with (folder / TASKS_FILE).open(encoding="utf-8") as lines:
        return [TaskRow(**json.loads(line)) for line in lines]
