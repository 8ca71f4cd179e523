"""What `sqat analyze` found, as JSON has it, and the fragment of a recipe that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from sqat.analyze.budget import Kept
from sqat.analyze.sensitivity import Damages, Probe, count_multiply_adds
from sqat.checkpoint.manifest import Figure
from sqat.evaluation.inference import EVALUATION_BATCH
from sqat.models.layer_selection import weighted_layers
from sqat.recipe.stages import Layers

STRICT = ConfigDict(extra="forbid")


class Harm(BaseModel):
    """Damage of each treatment; None where there is no such treatment."""

    model_config = STRICT

    pruned: Figure | None
    int8: Figure | None
    both: Figure

    @classmethod
    def of(cls, damages: Damages) -> Harm:
        return cls(**damages._asdict())


class LayerFinding(BaseModel):
    """One layer; ``multiply_adds`` as a share of those of all linears and convolutions, as ``weights`` is of theirs."""

    model_config = STRICT

    name: str
    shape: list[int]
    pattern: str
    weights: float
    multiply_adds: float
    damage: Harm


class Shares(BaseModel):
    """How much of all linears' and convolutions' weights and multiply-adds is in treated layers."""

    model_config = STRICT

    weights: float
    multiply_adds: float


class Choice(BaseModel):
    """What keeps within a budget: layers to leave dense and float, predicted (a sum) and measured damage.

    Attributes:
        sparse: share of the layers that stay pruned.
        int8: share of those that stay int8.
        recipe: stage -> the layers section that says so; None where nothing would be left to treat.
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
    """All of it; layers with the largest damage first.

    Attributes:
        damage: what is measured: the output loss, or the metric that is lost.
        plain: the task's metrics of the model as it is, on the same rows.
        together: damage with all layers treated.
        summed: sum of the damages of single layers.
    """

    model_config = STRICT

    checkpoint: str
    prune: str | None
    calibrate: str | None
    damage: str
    split: str
    rows: int
    plain: dict[str, Figure]
    layers: list[LayerFinding]
    together: Harm
    summed: Harm
    sparse: Shares
    int8: Shares
    choice: Choice | None
    notes: list[str]
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """Share of each linear and convolution in the weights and multiply-adds of all."""

    weights: dict[str, float]
    multiply_adds: dict[str, float]

    @classmethod
    def of(cls, probe: Probe) -> Sizes:
        """Multiply-adds are counted on the first rows, with their padding."""
        batch = probe.processor.collate(probe.rows, list(range(min(len(probe.rows), EVALUATION_BATCH))))
        weights = {name: module.weight.numel() for name, module in weighted_layers(probe.model).items()}
        return cls(shares(weights), shares(count_multiply_adds(probe.model, batch)))

    def share_of(self, names: Sequence[str]) -> Shares:
        """Share of the named layers together."""
        added = (sum(counts[name] for name in names) for counts in (self.weights, self.multiply_adds))
        return Shares(**dict(zip(("weights", "multiply_adds"), added, strict=True)))


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Counts as shares of their sum."""
    whole = sum(counts.values())
    return {name: count / whole for name, count in counts.items()}


def layers_section(layers: Layers, left_out: Sequence[str]) -> str:
    """The recipe's ``layers`` with more of them excluded, as YAML that fits in a block and in braces."""
    include = "" if layers.include is None else f"include: {listed(layers.include)}, "
    return f"layers: {{{include}exclude: {listed([*dict.fromkeys((*layers.exclude, *left_out))])}}}"


def listed(names: Sequence[str]) -> str:
    """Texts as a YAML list, one a line."""
    lines = ",".join(f'\n  "{name}"' for name in names)
    return f"[{lines}]"


def tell_choice(
    budget: float,
    kept: Kept,
    treated: Mapping[str, Sequence[str]],
    sections: Mapping[str, tuple[str, Layers]],
    sizes: Sizes,
) -> Choice:
    """The choice in words of a recipe.

    Args:
        treated: pruned -> layers, int8 -> layers.
        sections: pruned -> stage and its ``layers``, int8 -> the same.
    """
    left = {kind: [step.layer for step in kept.left_out if step.kind == kind] for kind in ("pruned", "int8")}
    stay = {kind: [name for name in treated[kind] if name not in left[kind]] for kind in left}
    recipe = {stage: layers_section(layers, left[kind]) if stay[kind] else None
              for kind, (stage, layers) in sections.items()}  # fmt: skip
    return Choice(budget=budget, dense=left["pruned"], float_layers=left["int8"], predicted=kept.predicted,
                  measured=kept.measured, sparse=sizes.share_of(stay["pruned"]),
                  int8=sizes.share_of(stay["int8"]), recipe=recipe)  # fmt: skip
