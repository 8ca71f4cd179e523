"""Find once how each layer would be pruned and quantized, then treat any of them for a while.

Masks and amax are those of a stage that prunes at once, and of one that calibrates the dense model for placement
``linear``; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sqat.compress.idle_layers import find_idle_layers
from sqat.compress.patterns import choose_patterns
from sqat.compress.quantize import quantized_model
from sqat.compress.training_losses import task_loss
from sqat.data.batch import Processor
from sqat.modules.parametrize import get_layer, original_weight
from sqat.recipe.stages import CalibrateConfig, PruneConfig
from sqat.sparsity.schedules.per_group import PerGroup
from sqat.stages.calibrate import calibrate_on_rows
from sqat.stages.context import StageContext
from sqat.stages.prune import example_inputs, start_pruning


@dataclass(frozen=True)
class Pruning:
    """Masks of the layers that are pruned, and their weights where the criterion corrects them."""

    patterns: dict[str, str] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    corrected: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantization:
    """Layers whose weights and inputs are int8, and the amax of their sites."""

    layers: list[str] = field(default_factory=list)
    amax: dict[str, Tensor] = field(default_factory=dict)
    shared_with: dict[str, str] = field(default_factory=dict)


@contextmanager
def treated_(
    model: nn.Module, pruning: Pruning, quantization: Quantization, pruned: Collection[str], int8: Collection[str]
) -> Iterator[None]:
    """Prune and quantize the named layers; afterwards every weight has the bits it had before."""
    before = copy_weights(model, pruned)
    masks = {name: pruning.masks[name] for name in pruned}
    shared_with = {site: to for site, to in quantization.shared_with.items() if site.rpartition(":")[0] in int8}
    amax = {site: quantization.amax[site] for site in shared_with.values()}
    try:
        set_weights_(model, {name: pruning.corrected[name] for name in pruned if name in pruning.corrected})
        with quantized_model(model, masks, int8, amax, shared_with, "linear"):
            yield
    finally:
        set_weights_(model, before)


def copy_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the named layers' weights."""
    return {name: get_layer(model, name).weight.detach().clone() for name in names}


@torch.no_grad()
def set_weights_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into their layers, bit by bit."""
    for name, weight in weights.items():
        get_layer(model, name).weight.copy_(weight)


def find_pruning(model: nn.Module, config: PruneConfig, context: StageContext, processor: Processor) -> Pruning:
    """Choose the masks of a prune stage as if it had one step; weights stay as they are, in the stage's order."""
    at_once = config.model_copy(update={"schedule": PerGroup(num_masks=1)})
    batches = context.training_batches(config, processor)
    idle = find_idle_layers(model, example_inputs(model, batches, context.recipe.seed))
    patterns, _ = choose_patterns(model, config.layers, config.pattern, config.patterns, idle)
    masks, _ = start_pruning(at_once, model, patterns, {0: 0}, batches, task_loss(context.task), context, {})
    before = {name: original_weight(get_layer(model, name)).detach().clone() for name in patterns}
    try:
        masks.before_step(0)
        chosen, after = masks.masks, {name: original_weight(get_layer(model, name)).detach() for name in patterns}
        corrected = {name: weight.clone() for name, weight in after.items() if not torch.equal(weight, before[name])}
    finally:
        masks.remove()
        set_weights_(model, before)
    return Pruning({name: str(pattern) for name, pattern in patterns.items()}, chosen, corrected)


def find_quantization(
    model: nn.Module, config: CalibrateConfig, context: StageContext, processor: Processor
) -> Quantization:
    """Calibrate as a calibrate stage of placement ``linear`` does; batch norms are folded, and stay folded."""
    choice, calibration = calibrate_on_rows(config, "linear", model, processor, context)
    return Quantization(choice.chosen, calibration.amax, calibration.shared_with)
