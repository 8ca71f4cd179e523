"""What pruning and int8 would do to each layer of a model, found once, and put on any of them for a while.

Masks, corrected weights and bounds are those of a stage that prunes at once and of one that calibrates right after
the dense model: no weight is trained. Kept per layer are a mask (a byte a weight) and, where the criterion moves the
weights that stay (sparsegpt), these. Left out: sites of other placements than linear, rounding of biases, bounds
observed with the masks in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sqat.compress.distil import task_loss
from sqat.compress.patterns import choose_patterns
from sqat.compress.quantize import quantized_model
from sqat.data.batch import Processor
from sqat.models.layer_selection import choose_layers
from sqat.modules.parametrize import layer, original_weight
from sqat.recipe.stages import CalibrateConfig, PruneConfig
from sqat.sparsity.schedules.per_group import PerGroup
from sqat.stages.calibrate import calibrate_on_rows
from sqat.stages.context import StageContext
from sqat.stages.prune import start_pruning


@dataclass(frozen=True)
class Pruning:
    """Masks of the layers that are pruned, and their weights where the criterion moved them."""

    patterns: dict[str, str] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    corrected: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounding:
    """Layers whose weights and inputs are int8, and how they were calibrated."""

    layers: list[str] = field(default_factory=list)
    amax: dict[str, Tensor] = field(default_factory=dict)
    shared_with: dict[str, str] = field(default_factory=dict)

    def of_layers(self, names: Collection[str]) -> Rounding:
        """The same for the named layers alone."""
        shared_with = {site: owner for site, owner in self.shared_with.items() if site.rpartition(":")[0] in names}
        return Rounding([*names], {owner: self.amax[owner] for owner in shared_with.values()}, shared_with)


@contextmanager
def treated_(
    model: nn.Module, pruning: Pruning, rounding: Rounding, pruned: Collection[str], quantized: Collection[str]
) -> Iterator[None]:
    """Prune and quantize the named layers; afterwards every weight has the bits it had before."""
    saved = copy_weights(model, pruned)
    masks = {name: pruning.masks[name] for name in pruned}
    try:
        set_weights_(model, {name: pruning.corrected[name] for name in pruned if name in pruning.corrected})
        int8 = rounding.of_layers(quantized)
        with quantized_model(model, masks, int8.layers, int8.amax, int8.shared_with, "linear"):
            yield
    finally:
        set_weights_(model, saved)


def copy_weights(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of the named layers' weights."""
    return {name: layer(model, name).weight.detach().clone() for name in names}


def set_weights_(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write weights into their layers, bit by bit."""
    with torch.no_grad():
        for name, weight in weights.items():
            layer(model, name).weight.copy_(weight)


def find_pruning(model: nn.Module, config: PruneConfig, context: StageContext, processor: Processor) -> Pruning:
    """Choose the masks of a prune stage as if it had one step; the model is left as it was, permuted if asked for."""
    at_once = config.model_copy(update={"schedule": PerGroup(num_masks=1)})
    patterns, _ = choose_patterns(model, config.layers, config.pattern, config.patterns)
    batches = context.training_batches(config, processor)
    masks, _ = start_pruning(at_once, model, patterns, {0: 0}, batches, task_loss(context.task), context, {})
    before = {name: original_weight(layer(model, name)).detach().clone() for name in patterns}
    try:
        masks.before_step(0)
        chosen, after = masks.masks, {name: original_weight(layer(model, name)).detach() for name in patterns}
        corrected = {name: weight.clone() for name, weight in after.items() if not torch.equal(weight, before[name])}
    finally:
        masks.remove()
        set_weights_(model, before)
    return Pruning({name: str(pattern) for name, pattern in patterns.items()}, chosen, corrected)


def find_rounding(model: nn.Module, config: CalibrateConfig, context: StageContext, processor: Processor) -> Rounding:
    """Calibrate the inputs of the linears (of convolutions outputs too) as a calibrate stage of placement linear does.

    Batch norms are folded first, as that stage folds them, and stay so.
    """
    layers = choose_layers(model, config.layers, "quantize").chosen
    found = calibrate_on_rows(config, "linear", model, processor, layers, context)
    return Rounding(layers, found.amax, found.shared_with)
