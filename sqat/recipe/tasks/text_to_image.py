"""Settings of text to image."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sqat.recipe.tasks.spec import TaskSettings, TaskSpec


class TextToImageTask(TaskSettings):
    """Image generation from captions by rectified flow; data.columns.text is the caption."""

    name: Literal["text-to-image"] = Field(default="text-to-image", description="name of the task")
    metric: Literal["explained"] = Field(default="explained", description="dev metric that selects the best step")


TEXT_TO_IMAGE = TaskSpec(
    TextToImageTask,
    "sqat.tasks.text_to_image",
    columns=("image", "text"),
    output_losses=("mse",),
    starts_from_config=True,
    reads_captions=True,
)
