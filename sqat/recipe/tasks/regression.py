"""Settings of regression from texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sqat.recipe.tasks.spec import TaskSettings, TaskSpec


class RegressionTask(TaskSettings):
    """Regression from one or two texts."""

    name: Literal["regression"] = Field(default="regression", description="name of the task")
    metric: Literal["spearman", "pearson"] = Field(
        default="spearman", description="dev metric that selects the best step"
    )


REGRESSION = TaskSpec(
    RegressionTask,
    "sqat.tasks.regression",
    columns=("text", "text_pair", "label"),
    output_losses=("mse",),
    streamable=True,
)
