"""What `sqat analyze` found, as its JSON file has it, and the sections of a recipe that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from sqat.checkpoint.manifest import Figure
from sqat.checkpoint.outputs import MADE_BY
from sqat.recipe.stages import Layers

STRICT = ConfigDict(extra="forbid")


class Sensitivity(BaseModel):
    """How much each treatment changes the model; None where a layer does not get it."""

    model_config = STRICT

    pruned: Figure | None
    int8: Figure | None
    both: Figure

    @classmethod
    def sum(cls, parts: Sequence[Sensitivity]) -> Sensitivity:
        """Add up the sensitivities of single layers, treatment by treatment."""
        both = sum(part.both for part in parts)
        return cls(pruned=add([part.pruned for part in parts]), int8=add([part.int8 for part in parts]), both=both)


def add(values: Iterable[float | None]) -> float | None:
    """The sum of the values that are there; None where none is."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) if numbers else None


class LayerFinding(BaseModel):
    """One layer; ``weights`` and ``multiply_adds`` are shares of those of all linears and convolutions."""

    model_config = STRICT

    name: str
    shape: list[int]
    pattern: str
    weights: float
    multiply_adds: float
    sensitivity: Sensitivity


class Shares(BaseModel):
    """Share of the weights and multiply-adds of all linears and convolutions."""

    model_config = STRICT

    weights: float
    multiply_adds: float


class BudgetChoice(BaseModel):
    """Which layers to leave dense and float, so that the sensitivity of the model stays within a budget.

    Attributes:
        predicted: sum of the sensitivities of the single layers that are treated.
        measured: sensitivity with all of them treated.
        sparse: share of the layers that stay pruned.
        int8: share of those that stay int8.
        recipe: stage -> its layers section; None where no layer remains to treat.
    """

    model_config = STRICT

    budget: float
    dense: list[str]
    float_layers: list[str]
    predicted: Figure
    measured: Figure
    sparse: Shares
    int8: Shares
    recipe: dict[str, str | None]


class Findings(BaseModel):
    """Everything that was measured; the most sensitive layers first.

    Attributes:
        measure: what sensitivity is: the output loss, or the metric whose decrease is measured.
        plain: the task's metrics of the untreated model on the same rows.
        together: sensitivity with all layers treated.
        summed: sum of the sensitivities of single layers.
    """

    model_config = STRICT

    comment: str = MADE_BY
    checkpoint: str
    prune: str | None
    calibrate: str | None
    measure: str
    split: str
    rows: int
    plain: dict[str, Figure]
    layers: list[LayerFinding]
    together: Sensitivity
    summed: Sensitivity
    sparse: Shares
    int8: Shares
    choice: BudgetChoice | None
    notes: list[str]
    seconds: float


def share_of(sizes: Mapping[str, Shares], names: Iterable[str]) -> Shares:
    """Share of the named layers together."""
    chosen = [sizes[name] for name in names]
    return Shares(
        weights=sum(size.weights for size in chosen), multiply_adds=sum(size.multiply_adds for size in chosen)
    )


def format_layers(layers: Layers, skipped: Iterable[str]) -> str:
    """The recipe's ``layers`` with more of them excluded, as YAML that fits in a block and in braces."""
    include = "" if layers.include is None else f"include: {format_list(layers.include)}, "
    return f"layers: {{{include}exclude: {format_list(dict.fromkeys((*layers.exclude, *skipped)))}}}"


def format_list(names: Iterable[str]) -> str:
    """Texts as a YAML list, one a line."""
    lines = ",".join(f'\n  "{name}"' for name in names)
    return f"[{lines}]"
