"""The recipe as a whole: every key a YAML recipe may hold, its type, bounds and default.

`sqat.recipe.loader` reads YAML into it; `sqat.recipe.cross_checks` checks what must be true between its parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sqat.recipe.fields import STRICT, StageName, lists_to_tuples
from sqat.recipe.inputs import DataConfig, ModelConfig
from sqat.recipe.stages import STAGE_TYPES, StageConfig, distill_config, reconstructs
from sqat.recipe.tasks import Task


def fill_in_types(value: Any) -> Any:
    """Fill in ``type`` where a stage's name is its type, so that ``prune: {}`` is enough."""
    if not isinstance(value, dict):
        return value
    stages = {}
    for name, config in value.items():
        config = {} if config is None else config
        if isinstance(config, dict) and "type" not in config and name in STAGE_TYPES:
            config = {"type": name, **config}
        stages[name] = lists_to_tuples(config)
    return stages


class LatencyConfig(BaseModel):
    """How `sqat run` times the results: on the first test rows, in every engine of this machine."""

    model_config = STRICT

    batch_size: int = Field(default=32, ge=1, description="test rows of a call, padded to the longest")
    threads: int = Field(default=1, ge=1, description="threads, each on its own core")
    max_seconds: float = Field(default=60.0, gt=0, description="seconds of timing, at most")


class Recipe(BaseModel):
    """One recipe: model, task, data and the tree of stages."""

    model_config = STRICT

    name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="run folder; default: the file's name",
        json_schema_extra={"words": "letters, digits and . _ -"},
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of row order, dropout and new weights")
    output: str = Field(default="runs", description="folder of the runs, relative to the working directory")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="where losses and metrics are logged; TensorBoard writes to tracking in the run folder"
    )
    model: ModelConfig = Field(description="model to start from")
    task: Task = Field(description="what the model learns; a bare text is its name")
    data: DataConfig = Field(description="files and columns")
    stages: Annotated[
        dict[StageName, Annotated[StageConfig, Field(discriminator="type")]], BeforeValidator(fill_in_types)
    ] = Field(
        min_length=1,
        max_length=100,
        description="name -> stage, in order of execution; a stage named by its type needs no key 'type'",
    )
    results: dict[str, str] = Field(
        default={}, description="rows of the results table: label -> stage or stage/target; default: every last stage"
    )

    latency: LatencyConfig | None = Field(
        default=None, description="time every result, so that the table says how fast it is; {}: defaults"
    )

    def parent_of(self, name: str) -> str | None:
        """Name of the stage that ``name`` starts from; None for the pretrained model."""
        explicit = self.stages[name].parent
        if explicit is not None:
            return explicit
        names = list(self.stages)
        earlier = names[: names.index(name)]
        return next((other for other in reversed(earlier) if self.stages[other].type != "export"), None)

    def ancestors_of(self, name: str) -> list[str]:
        """Names of the stages that ``name`` starts from, the nearest first."""
        parent = self.parent_of(name)
        return [] if parent is None else [parent, *self.ancestors_of(parent)]

    def teacher_of(self, name: str) -> str | None:
        """Name of the stage that teaches ``name``: the recipe's choice, or the nearest dense ancestor; None without."""
        stage = self.stages[name]
        distill = distill_config(stage)
        chosen = None if distill is None else distill.teacher
        if chosen is not None and chosen.stage is not None:
            return chosen.stage
        is_taught = distill is not None and chosen is None
        return self.dense_ancestor_of(name) if is_taught or reconstructs(stage) else None

    def dense_ancestor_of(self, name: str) -> str | None:
        """Name of the nearest dense ancestor of ``name``; None without one."""
        return next((other for other in self.ancestors_of(name) if self.stages[other].type == "train"), None)


class LoadedRecipe(BaseModel):
    """A recipe with its file: every checkpoint keeps the text verbatim."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...] = ()

    @property
    def run_directory(self) -> Path:
        return Path(self.recipe.output) / self.recipe.name
