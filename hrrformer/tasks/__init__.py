"""The benchmark tasks: what each reads, its vocabulary and its classes."""

from __future__ import annotations

from hrrformer.tasks.image import IMAGE
from hrrformer.tasks.listops import LISTOPS
from hrrformer.tasks.malware import MALWARE
from hrrformer.tasks.pathfinder import PATHFINDER, PATHX
from hrrformer.tasks.protocol import Task
from hrrformer.tasks.retrieval import RETRIEVAL
from hrrformer.tasks.text import TEXT
from runtime.errors import UserError

TASKS = {task.name: task for task in (LISTOPS, TEXT, RETRIEVAL, IMAGE, PATHFINDER, PATHX, MALWARE)}


def get_task(name: str) -> Task:
    """Raises UserError for a name that is not in TASKS."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'; tasks are {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "Task", "get_task"]
