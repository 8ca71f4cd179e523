"""Calibrate a model: observe batches -> histograms of |x| -> one amax for every activation site.

Processes that share the batches find the very histograms that one process finds, since histograms count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor, nn

from sqat.compress.check_hooks import check_hooks
from sqat.compress.eval_mode import eval_mode
from sqat.compress.judge_amax import Judge, RowSample, plan_samples
from sqat.compress.quantize import attention_for
from sqat.distributed import all_reduce_max, all_reduce_sum, process_state
from sqat.errors import SqatError
from sqat.models.layer_selection import encoder_blocks
from sqat.modules.batch_norm import find_foldable_norms, fold_batch_norms_
from sqat.modules.hooks import hook_sites
from sqat.modules.site_discovery import discover_sites
from sqat.modules.sites import Site, Sites, align_positions
from sqat.quantization.calibrators import Calibrator
from sqat.quantization.fake_quant import ACTIVATION_LOW, HIGH, SMALLEST_AMAX, check_amax
from sqat.quantization.histogram import Histogram
from sqat.quantization.placement import PLACEMENTS

FOLDING_TOLERANCE = 1e-3  # of the largest logit

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """Where activations are quantized, and the amax of each site.

    Attributes:
        amax: site -> positive 0-d float32.
        shared_with: site -> the site whose amax it uses, itself for most.
        saturated: site -> share of its values beyond the amax.
        skipped: site -> why it stays float.
        histograms: site -> histogram of |x|, of every tensor once.
        methods: site -> name of the method whose amax it has, where the calibrator chooses among several.
        has_attention: False where the placement quantizes attention products, and the model keeps them float.
    """

    amax: dict[str, Tensor]
    shared_with: dict[str, str]
    saturated: dict[str, float]
    skipped: dict[str, str]
    histograms: dict[str, Histogram]
    methods: dict[str, str]
    has_attention: bool


def calibrate(
    model: nn.Module,
    batches: Iterable[Inputs],
    calibrator: Calibrator,
    placement: str,
    layers: Sequence[str],
    example: Inputs | None = None,
) -> Calibration:
    """Observe batches in eval mode and choose the amax of every activation site; the model stays as it is.

    Args:
        batches: arguments of the model's forward; padding is not observed.
        layers: linears and convolutions that are quantized.
        example: the same batch in all processes, where these share the batches and merge what they observe.
            Default: the first of ``batches``, and each process is on its own.

    Raises:
        SqatError: there is no batch, or hooks at the sites change what the model computes.
        ValueError: a value is not finite, or an amax is not positive.
    """
    blocks, alone = encoder_blocks(model), example is None
    with eval_mode(model), attention_for(model, placement) as has_attention:
        if example is None:
            remaining = iter(batches)
            example = next(remaining, None)
            if example is None:
                raise SqatError("there is no batch to calibrate with", "give some training batches", code="no-rows")
            batches = chain([example], remaining)
        check_hooks(model, example, layers, placement)
        sites = discover_sites(model, example, layers, blocks, PLACEMENTS[placement])
        samples = plan_samples(model, sites, calibrator.rows)
        state = process_state()
        numbers = count() if alone else count(state.process_index, state.num_processes)
        histograms = observe(model, sites, blocks, batches, samples, numbers)
    if not alone:
        merge_over_processes_(histograms)
        for sample in samples.values():
            sample.merge_over_processes()
    low = -HIGH if PLACEMENTS[placement].kernels else ACTIVATION_LOW
    return choose_amax(sites, histograms, calibrator, Judge(sites, histograms, samples, low), has_attention)


def observe(
    model: nn.Module,
    sites: Sites,
    blocks: list[str],
    batches: Iterable[Inputs],
    samples: Mapping[Site, RowSample] | None = None,
    numbers: Iterable[int] = (),
) -> dict[str, Histogram]:
    """Collect a histogram of |x| at every site, over the real (unpadded) positions of all batches.

    Args:
        samples: collect rows of inputs too, by site.
        numbers: of the batches, for ``samples``.
    """
    samples, number, remaining = samples or {}, 0, iter(numbers)
    histograms: dict[str, Histogram] = {site: Histogram() for site in dict.fromkeys(sites.shared_with.values())}
    attention_mask: Tensor | None = None

    def hook(site: Site, x: Tensor) -> Tensor:
        if site in samples:
            samples[site].observe(site, x, attention_mask, number)
        if site in histograms:
            limits = sites.rectifier_limits
            read = x.clamp(0, limits[site]) if site in limits else x
            histograms[site].observe(*align_positions(site, read, attention_mask))
        return x

    hooks = hook_sites(model, hook, [*histograms, *samples], blocks)
    try:
        with torch.no_grad():
            for inputs in batches:
                number = next(remaining, 0)
                attention_mask = inputs.get("attention_mask")
                model(**inputs)
    finally:
        hooks.remove()
    return histograms


def merge_over_processes_(histograms: Mapping[str, Histogram]) -> None:
    """Let every process's histograms hold what all processes observed."""
    names = sorted(histograms)
    exponents = all_reduce_max(torch.tensor([histograms[name].exponent for name in names]))
    peaks = all_reduce_max(torch.tensor([histograms[name].max_abs for name in names], dtype=torch.float64))
    for name, exponent in zip(names, exponents, strict=True):
        empty = Histogram()
        empty.exponent = int(exponent)
        histograms[name].merge(empty)  # makes the bins as wide as the widest
    counts = all_reduce_sum(torch.stack([histograms[name].counts for name in names]))
    for name, own, peak in zip(names, counts, peaks.tolist(), strict=True):
        histograms[name].counts, histograms[name].max_abs = own, peak


def choose_amax(
    sites: Sites, histograms: Mapping[str, Histogram], calibrator: Calibrator, judge: Judge, has_attention: bool
) -> Calibration:
    """Choose the amax of every site; sites that share one get the largest of theirs (rule T16)."""
    # Any scale holds what is always 0, such as the output of dead channels.
    candidates = {
        site: calibrator.candidates(histogram) if histogram.max_abs >= SMALLEST_AMAX else {}
        for site, histogram in histograms.items()
    }
    alone = {site: (Site(site),) for site in candidates}
    groups = alone | {site: group for group in sites.shared_amax_groups for site in group}
    chosen = {group: judge.choose(group, candidates) for group in dict.fromkeys(groups.values())}
    methods = {site: chosen[group] for site, group in groups.items()}
    values = {site: candidates[site].get(method, 1.0) for site, method in methods.items()}
    shared_with, values = share_amax(sites, values)
    amax = {site: torch.tensor(value, dtype=torch.float32) for site, value in values.items()}
    for site, value in amax.items():
        check_amax(value, site)
    saturated = {
        site: histograms[sites.shared_with[Site(site)]].share_beyond(values[owner])
        for site, owner in shared_with.items()
    }
    named = {site: methods[owner] for site, owner in shared_with.items() if len(candidates[owner]) > 1}
    return Calibration(amax, shared_with, saturated, sites.skipped, dict(histograms), named, has_attention)


def share_amax(sites: Sites, amax: Mapping[str, float]) -> tuple[dict[str, str], dict[str, float]]:
    """Give each group of sites with one amax the largest of theirs; returns ``shared_with`` and ``amax``."""
    owners: dict[str, str] = {}
    largest_of = dict(amax)
    for group in sites.shared_amax_groups:
        largest_of[group[0]] = max(largest_of[site] for site in group)
        owners |= dict.fromkeys(group, group[0])
    shared_with: dict[str, str] = {site: owners.get(first, first) for site, first in sites.shared_with.items()}
    return shared_with, {site: largest_of[site] for site in dict.fromkeys(shared_with.values())}


@torch.no_grad()
def fold_norms_(model: nn.Module, inputs: Inputs) -> None:
    """Fold the batch norms, if there are any, and check that the model computes what it did.

    Raises:
        SqatError: it does not. A norm then follows another convolution than the one before it in its module.
    """
    if not find_foldable_norms(model):
        return
    before: Tensor = model.eval()(**inputs).logits
    norms = fold_batch_norms_(model)
    difference = float((model(**inputs).logits - before).abs().max())
    if difference > FOLDING_TOLERANCE * float(before.abs().max()):
        norm, convolution = next(iter(norms.items()))
        problem = f"{len(norms)} batch norms cannot be folded, the first {norm} into {convolution}"
        hint = "use a model whose batch norms directly follow their convolutions"
        raise SqatError(f"{problem}: the logits change by {difference:.2g}", hint, code="unsupported-model")
