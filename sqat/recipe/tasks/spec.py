"""What a recipe may say of a task, and what the rest of sqat asks of it before any row is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel

from sqat.distillation import OutputLossName
from sqat.recipe.fields import STRICT


class TaskSettings(BaseModel):
    """Base of the settings of a task; each adds ``name`` and ``metric``, whose names are its Literal."""

    model_config = STRICT

    if TYPE_CHECKING:
        name: str = ""
        metric: str = ""

    def metric_names(self) -> list[str]:
        """Return the metrics that a gate may name; of each of them more is better."""
        return list(get_args(type(self).model_fields["metric"].annotation))

    def rows_per_group(self) -> int:
        """Return how many rows must share a batch, so that a stage's batch_size may not be smaller."""
        return 1

    def streaming_problem(self) -> tuple[str, str] | None:
        """Return what is missing to train on a stream, and what to do; None where nothing is."""
        return None


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        settings: what the recipe's section ``task`` may hold.
        module: has ``read_records``, ``check_rows`` and ``build``, as `sqat.tasks.task.TaskModule` says.
        columns: keys of ``data.columns`` that mean something to the task.
        output_losses: how a stage may distil the model's outputs; the first is the default.
        streamable: each row is a text that stands alone, so that train may be streamed.
        starts_from_config: ``model.config`` may describe a model with random weights.
        reads_captions: ``model.text_encoder`` reads captions.
        augments: ``data.augment`` may vary the images.
    """

    settings: type[TaskSettings]
    module: str
    columns: tuple[str, ...]
    output_losses: tuple[OutputLossName, ...]
    streamable: bool = False
    starts_from_config: bool = False
    reads_captions: bool = False
    augments: bool = False
