"""Calibration and fake quantization in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from sqat.api.choices import Inputs, check_masks, check_plain, choose_part, model_inputs
from sqat.api.pruning import Masks
from sqat.compress.calibrate import calibrate as calibrate_model
from sqat.compress.quantize import quantized_model
from sqat.errors import SqatError
from sqat.export.cpu_encoder import check_encoder
from sqat.models.layer_selection import choose_layers, is_convolutional, weighted_layers
from sqat.quantization.calibrators import CALIBRATORS, Calibrator
from sqat.quantization.histogram import Histogram
from sqat.recipe.cross_checks import suggest
from sqat.recipe.stages import Layers, Placement

Method = Callable[[Histogram], float]


@dataclass(frozen=True)
class Scales:
    """What is quantized to int8, and with which scale (bound / 127).

    Attributes:
        amax: leader site -> positive 0-d float32 bound.
        leaders: site -> the site whose bound it has.
        layers: whose weights are quantized, each row by its own maximum.
        placement: as in `calibrate`.
        left: layer or site -> why it stays float.
    """

    amax: Mapping[str, Tensor]
    leaders: Mapping[str, str]
    layers: tuple[str, ...]
    placement: Placement
    left: Mapping[str, str]


def calibrate(
    model: nn.Module,
    batches: Iterable[Inputs],
    method: str | Calibrator | Method = "percentile",
    placement: Placement = "linear",
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Scales:
    """Observe batches in eval mode and choose the bound of every activation site; the model stays as it is.

    Args:
        batches: keyword arguments of the model's forward; ``labels`` are left out, padding is not observed.
        method: a name, one of `sqat.quantization.calibrators` with its settings, or any function from a
            `Histogram` of |x| to a positive bound.
        placement: which sites are quantized: ``linear`` the inputs of linears, ``tensorrt`` also outputs, residual adds
            and attention products, ``tensorrt-full`` also what activation functions read, ``cpu`` as `sqat.runtime`.
        include: globs over layer names; default: every linear of the encoder that is large enough.
        exclude: globs of what is taken out again.

    Raises:
        SqatError: no batch, an unknown name, a glob that matches nothing, a network of convolutions, or a model that
            already has masks or quantizers.
        ValueError: a value that is not finite, or a bound that is not positive.
    """
    check_plain(model)
    if placement not in PLACEMENTS:
        raise SqatError(f"there is no placement {placement!r}", suggest(placement, PLACEMENTS))
    if is_convolutional(model):
        raise SqatError("networks of convolutions are calibrated by a recipe, which folds their batch norms")
    if placement == "cpu":
        check_encoder(model)
    chosen: Method = choose_part("method", method, CALIBRATORS, Calibrator)
    layers = Layers(include=None if include is None else tuple(include), exclude=tuple(exclude))
    choice = choose_layers(model, layers, "quantize")
    found = calibrate_model(model, inputs_of(model, batches), chosen, placement, choice.chosen)
    skipped = {**choice.left, **found.skipped}
    return Scales(found.amax, found.shared_with, tuple(choice.chosen), placement, skipped)


def inputs_of(model: nn.Module, batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Batches on the model's device, without labels; a loader is not asked before the first is read."""
    device = next(model.parameters()).device
    for batch in batches:
        yield model_inputs(batch, device)


@contextmanager
def quantized(model: nn.Module, masks: Masks | None, scales: Scales) -> Iterator[None]:
    """Fake-quantize a model, and hold its masks, while a block of code trains or measures it.

    Gradients go straight through. Afterwards weights are plain floats again, pruned ones +0.0; the scales stay as they
    were. An optimizer may be made before the block or in it: it holds the same parameters.

    Args:
        masks: of `prune`; None for a dense model.

    Raises:
        SqatError: masks or scales are not this model's, or it already has some.
    """
    kept = {} if masks is None else masks.kept
    check_plain(model)
    check_masks(model, kept)
    check_scales(model, scales)
    with quantized_model(model, kept, scales.layers, scales.amax, scales.leaders, scales.placement):
        yield


def check_scales(model: nn.Module, scales: Scales) -> None:
    """Refuse scales of other layers or sites than the model's, or without the bound of a site."""
    layers, modules = weighted_layers(model), dict(model.named_modules())
    strange = [f"{name}, which is no layer" for name in scales.layers if name not in layers]
    strange += [f"{site}, which is no site" for site in scales.leaders if site.rpartition(":")[0] not in modules]
    if strange:
        raise SqatError(f"the scales name {strange[0]} of this model", "calibrate this model")
    if missing := [f"{leader}, whose bound {site} has" for site, leader in scales.leaders.items()
                   if leader not in scales.amax]:  # fmt: skip
        raise SqatError(f"the scales have no bound of {missing[0]}", "calibrate this model")


PLACEMENTS: tuple[Placement, ...] = ("linear", "tensorrt", "tensorrt-full", "cpu")
