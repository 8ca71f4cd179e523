"""Calibration and fake quantization in a training loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn

from sqat.api.arguments import Inputs, check_masks, check_unchanged, choose_part, model_inputs, select_layers
from sqat.api.prune import Masks
from sqat.compress.calibrate import calibrate as calibrate_model
from sqat.compress.eval_mode import eval_mode
from sqat.compress.idle_layers import find_idle_layers
from sqat.compress.quantize import quantized_model
from sqat.errors import SqatError, suggest
from sqat.export.cpu.encoder import check_encoder
from sqat.models.conv1d import linears_for_conv1d
from sqat.models.layer_selection import choose_layers, is_convolutional, weighted_layers
from sqat.modules.plain_state import remove_all, save_plain_weights_
from sqat.quantization.calibrators import CALIBRATORS, Calibrator
from sqat.quantization.histogram import Histogram
from sqat.quantization.placement import PLACEMENTS, PlacementName

CalibratorFn = Callable[[Histogram], float]


@dataclass(frozen=True)
class Scales:
    """What is quantized to int8, and its scales (amax / 127).

    Attributes:
        amax: site -> positive 0-d float32.
        shared_with: site -> the site whose amax it uses, itself for most.
        layers: layers whose weights are quantized, each row by its own largest value.
        placement: as in `calibrate`.
        skipped: layer or site -> why it stays float.
        methods: site -> name of the method that ``auto`` chose for it.
    """

    amax: Mapping[str, Tensor]
    shared_with: Mapping[str, str]
    layers: tuple[str, ...]
    placement: PlacementName
    skipped: Mapping[str, str]
    methods: Mapping[str, str] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    batches: Iterable[Inputs],
    method: str | Calibrator | CalibratorFn = "percentile",
    placement: PlacementName = "linear",
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Scales:
    """Observe batches in eval mode and choose the amax of every activation site; the model stays as it is.

    Args:
        batches: arguments of the model's forward; ``labels`` are ignored, padding is not observed.
        method: a name, one of `sqat.quantization.calibrators` with its settings, or any function from a
            `Histogram` of |x| to a positive amax.
        placement: which sites are quantized: ``linear`` the inputs of linears, ``tensorrt`` also outputs, residual adds
            and attention products, ``tensorrt-full`` also inputs of activation functions, ``cpu`` those of
            `sqat.runtime`.
        include: globs over layer names; default: every linear of the encoder that is large enough.
        exclude: globs of layers that stay float.

    Raises:
        SqatError: no batch, an unknown name, a glob that matches no layer, a network of convolutions, or a model that
            already has masks or quantizers.
        ValueError: a value is not finite, or an amax is not positive.
    """
    check_unchanged(model)
    if placement not in PLACEMENTS:
        raise SqatError(f"there is no placement {placement!r}", suggest(placement, PLACEMENTS), code="unknown-name")
    if is_convolutional(model):
        raise SqatError("sqat.calibrate does not fold the batch norms of a network of convolutions",
                        "calibrate it with a recipe", code="unsupported-model")  # fmt: skip
    calibrator = choose_calibrator(method)
    layers, inputs = select_layers(include, exclude), read_inputs(model, batches)
    with linears_for_conv1d(model), eval_mode(model):  # where a loader draws nothing of the caller's
        if PLACEMENTS[placement].kernels:
            check_encoder(model)
        example = next(inputs, None)
        if example is None:
            raise SqatError("there is no batch to calibrate with", "give some training batches", code="no-rows")
        choice = choose_layers(model, layers, "quantize", idle=find_idle_layers(model, example))
        calibration = calibrate_model(model, chain([example], inputs), calibrator, placement, choice.chosen)
    return Scales(
        calibration.amax,
        calibration.shared_with,
        tuple(choice.chosen),
        placement,
        {**choice.skipped, **calibration.skipped},
        calibration.methods,
    )


@dataclass(frozen=True)
class OwnCalibrator(Calibrator):
    """A user's function as a calibrator."""

    function: CalibratorFn
    name: str = "function"

    def choose_amax(self, histogram: Histogram) -> float:
        """Return its amax."""
        return float(self.function(histogram))

    def __call__(self, histogram: Histogram) -> float:
        return self.choose_amax(histogram)  # an amax that is not positive is an error, as in `sqat.calibrate`


def choose_calibrator(method: str | Calibrator | CalibratorFn) -> Calibrator:
    """Return the calibrator of a name, itself, or a function as one."""
    chosen: Calibrator | CalibratorFn = choose_part("method", method, CALIBRATORS, Calibrator)
    return chosen if isinstance(chosen, Calibrator) else OwnCalibrator(chosen)


def read_inputs(model: nn.Module, batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Yield batches on the model's device, without labels; a loader draws nothing before the first is read."""
    device = next(model.parameters()).device
    for batch in batches:
        yield model_inputs(batch, device)


@contextmanager
def quantized(model: nn.Module, masks: Masks | None, scales: Scales) -> Iterator[None]:
    """Fake-quantize a model, with its masks, while a block of code trains or measures it.

    Afterwards weights are plain floats again, pruned ones +0.0. The optimizer may be made before the block or in it.

    Args:
        masks: of `prune`; None for a dense model.

    Raises:
        SqatError: masks or scales are not this model's, or it already has some.
    """
    masks_kept = {} if masks is None else masks.kept
    check_unchanged(model)
    with linears_for_conv1d(model):
        check_masks(model, masks_kept)
        check_scales(model, scales)
        with quantized_model(model, masks_kept, scales.layers, scales.amax, scales.shared_with, scales.placement):
            hooks = save_plain_weights_(model, dict.fromkeys((*masks_kept, *scales.layers)))
            try:
                yield
            finally:
                remove_all(hooks)


def check_scales(model: nn.Module, scales: Scales) -> None:
    """Raise for scales of other layers or sites than the model's, or without the amax of a site."""
    layers, modules = weighted_layers(model), dict(model.named_modules())
    unknown = [f"{name}, which is no layer of this model" for name in scales.layers if name not in layers]
    unknown += [f"{site}, which is no site of this model" for site in scales.shared_with
                if site.rpartition(":")[0] not in modules]  # fmt: skip
    unknown += [f"{owner}, whose amax {site} uses, but have no amax of it" for site, owner in scales.shared_with.items()
                if owner not in scales.amax]  # fmt: skip
    if unknown:
        raise SqatError(f"the scales name {unknown[0]}", "calibrate this model", code="model-mismatch")
