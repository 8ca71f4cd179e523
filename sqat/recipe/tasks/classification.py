"""Settings of classification, of texts or images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sqat.recipe.tasks.spec import TaskSettings, TaskSpec


class ClassificationTask(TaskSettings):
    """Classification of one or two texts, or of images."""

    name: Literal["classification", "image-classification"] = Field(
        default="classification", description="name of the task"
    )
    labels: tuple[str, ...] | None = Field(
        default=None, description="label names in order; default: sorted, from train"
    )
    metric: Literal["accuracy", "f1"] = Field(default="accuracy", description="dev metric that selects the best step")

    def streaming_problem(self) -> tuple[str, str] | None:
        if self.labels is None:
            return "the classes of a streamed split are not known beforehand", "give task.labels"
        return None


CLASSIFICATION = TaskSpec(
    ClassificationTask,
    "sqat.tasks.classification",
    columns=("text", "text_pair", "label"),
    output_losses=("kl",),
    streamable=True,
)
IMAGE_CLASSIFICATION = TaskSpec(
    ClassificationTask,
    "sqat.tasks.image_classification",
    columns=("image", "label"),
    output_losses=("kl",),
    starts_from_config=True,
    augments=True,
)
