"""Tasks: one file each of records, checks, loss and metrics; their settings are in `sqat.recipe.tasks`."""

from sqat.tasks.task import Task as Task
from sqat.tasks.task import build_task as build_task
from sqat.tasks.task import group_rows as group_rows
