"""Post-training calibration: a bound for every activation site, from histograms of what really flows there.

Each process observes its share of the batches. Histograms count, so that those of all processes add up to the very one
that a single process would have found.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sqat.checkpoint.manifest import HISTOGRAMS, LayerRecord, SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.data.dataset import Batch, Processor, column, plan_batches
from sqat.distributed import all_reduce_max, all_reduce_sum, process_state
from sqat.errors import SqatError
from sqat.evaluation.inference import logits_of
from sqat.export.cpu_encoder import check_encoder
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.models.loading import serialize_model, use_hooked_attention
from sqat.modules.activation_quantizers import Quantizers, tap_sites
from sqat.modules.batch_norm import fold_batch_norms_
from sqat.modules.bias import snap_biases_
from sqat.modules.quantized import quantized_
from sqat.modules.sites import Sites, discover_sites, observed_rows
from sqat.quantization.calibrators import find_bound
from sqat.quantization.histogram import Histogram
from sqat.recipe.schema import CalibrateConfig
from sqat.stages.context import StageContext

FOLDED_SLACK = 1e-3
MOST = 0.9999  # of the values: the bound of the account that we follow


def run(config: CalibrateConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Observe ``samples`` rows in eval mode and set every site's bound; of the weights only batch norms move."""
    model, processor = context.load_model(parent)
    choice = choose_layers(model, config.layers, "quantize")
    blocks = encoder_blocks(model)
    if config.profile == "cpu":
        check_encoder(model)
    tapped = config.profile == "linear" or use_hooked_attention(model, config.profile)
    notes = [] if parent is None else list(parent.manifest.notes)
    if not tapped:
        notes.append(f"{type(model).__name__} has no attention interface: its attention products stay float")
    batches = sample_batches(config, context, processor)
    fold_(model, batches[0])
    sites = discover_sites(model, batches[0].inputs, choice.chosen, blocks, config.profile)
    own = batches[process_state().process_index :: process_state().num_processes]
    histograms = observe(model, sites, blocks, shown(own, context))
    add_up_(histograms)
    bounds = {site: find_bound(config.method, histogram) for site, histogram in histograms.items()}
    leaders, amax = tie(sites, bounds)
    saturated = {site: histograms[sites.leaders[site]].share_beyond(amax[leader]) for site, leader in leaders.items()}
    records = {site: SiteRecord(shared_with=leader, saturated=saturated[site]) for site, leader in leaders.items()}
    tensors = {site: torch.tensor(bound, dtype=torch.float32) for site, bound in amax.items()}
    snap_biases_(model, choice.chosen, tensors, leaders)
    masks = {} if parent is None else parent.masks
    quantizers = Quantizers(tensors, leaders, kernels=config.profile == "cpu")
    with quantized_(model, masks, choice.chosen, quantizers, blocks):
        metrics = {"dev": context.measure(model, processor, "dev")}
    layers = record_layers(parent, choice.chosen, choice.left)
    files, weights = serialize_model(model, processor)
    files[HISTOGRAMS] = summaries(histograms)
    manifest = context.manifest(config, parent, metrics=metrics, layers=layers, sites=records, skipped=sites.left,
                            placement=config.profile, notes=notes)  # fmt: skip
    return Checkpoint(manifest, files, weights, masks, tensors)


def sample_batches(config: CalibrateConfig, context: StageContext, processor: Processor) -> list[Batch]:
    """The first ``samples`` rows of a seeded shuffle, length-bucketed; what a processor draws is seeded too."""
    rows = context.splits.prepared(config.split, processor)
    generator = torch.Generator().manual_seed(context.recipe.seed)
    chosen = torch.randperm(len(rows), generator=generator)[: config.samples].tolist()
    lengths = column(rows, "length").tolist()
    batches = plan_batches(lengths, [[index] for index in chosen], config.batch_size, context.recipe.seed, 0)
    torch.manual_seed(context.recipe.seed)
    return [processor.collate(rows, batch).to(process_state().device) for batch in batches]


def fold_(model: nn.Module, batch: Batch) -> None:
    """Fold the batch norms, if there are any, and see that the model computes what it did.

    Raises:
        SqatError: it does not: a norm lies behind another convolution than the one before it in its module.
    """
    before = evaluated(model, batch)
    norms = fold_batch_norms_(model)
    difference = float((evaluated(model, batch) - before).abs().max()) if norms else 0.0
    if difference > FOLDED_SLACK * float(before.abs().max()):
        raise SqatError(f"batch norm {next(iter(norms))} cannot be folded into {next(iter(norms.values()))}, or one of "
                        f"the other {len(norms) - 1} cannot: the logits move by {difference:.2g}",
                        "this model's norms do not follow the convolutions that stand before them")  # fmt: skip


def evaluated(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch in eval mode."""
    with torch.no_grad():
        return logits_of(model.eval(), batch)


def shown(batches: list[Batch], context: StageContext) -> Iterator[Mapping[str, Tensor]]:
    """The inputs of each batch; the reporter is told when the next one is asked for."""
    context.reporter.start(context.name, len(batches))
    for step, batch in enumerate(batches, start=1):
        begun = time.monotonic()
        yield batch.inputs
        context.reporter.advance(step, {}, len(batch) / (time.monotonic() - begun))
    context.reporter.finish()


def observe(
    model: nn.Module, sites: Sites, blocks: list[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Histogram]:
    """Histogram of |x| at every leader over the real (unpadded) positions of all batches, given by input name."""
    histograms = {leader: Histogram() for leader in dict.fromkeys(sites.leaders.values())}
    mask: list[Tensor | None] = []

    def tap(site: str, x: Tensor) -> Tensor:
        if site in histograms:
            passed = x.clamp(0, sites.rectified[site]) if site in sites.rectified else x
            histograms[site].observe(*observed_rows(site, passed, mask[0]))
        return x

    taps = tap_sites(model, tap, histograms, blocks)
    try:
        with torch.no_grad():
            for inputs in batches:
                mask[:] = [inputs.get("attention_mask")]
                model.eval()(**inputs)
    finally:
        taps.remove()
    return histograms


def add_up_(histograms: Mapping[str, Histogram]) -> None:
    """Let every process's histograms hold what all of them have seen."""
    names = sorted(histograms)
    widths = all_reduce_max(torch.tensor([histograms[name].exponent for name in names]))
    peaks = all_reduce_max(torch.tensor([histograms[name].max_abs for name in names], dtype=torch.float64))
    for name, exponent in zip(names, widths, strict=True):
        wide = Histogram()
        wide.exponent = int(exponent)
        histograms[name].merge(wide)  # empty: the bins are only made as wide
    counts = all_reduce_sum(torch.stack([histograms[name].counts for name in names]))
    for name, known, peak in zip(names, counts, peaks.tolist(), strict=True):
        histograms[name].counts, histograms[name].max_abs = known, peak


def summaries(histograms: Mapping[str, Histogram]) -> bytes:
    """`HISTOGRAMS`: site -> width and counts of 64 bins of |x|, and the |x| that covers 99.99 % by the fine bins."""
    found = {}
    for site, each in histograms.items():
        width, counts = each.summary()
        found[site] = {"width": width, "counts": counts, "covers": each.upper_edge(MOST)}
    return f"{json.dumps(found)}\n".encode()


def tie(sites: Sites, bounds: Mapping[str, float]) -> tuple[dict[str, str], dict[str, float]]:
    """Give each tied group one leader, whose bound is the largest of the group (rule T16)."""
    to: dict[str, str] = {}
    amax = dict(bounds)
    for group in sites.tied:
        amax[group[0]] = max(amax[leader] for leader in group)
        to |= dict.fromkeys(group, group[0])
    leaders = {site: to.get(leader, leader) for site, leader in sites.leaders.items()}
    return leaders, {leader: amax[leader] for leader in dict.fromkeys(leaders.values())}


def record_layers(parent: Checkpoint | None, chosen: list[str], left: Mapping[str, str]) -> dict[str, LayerRecord]:
    """What the parent says of its layers, and which are quantized now."""
    dense = LayerRecord(dense_because="no prune stage")
    known = {} if parent is None else parent.manifest.layers
    done = {name: known.get(name, dense).model_copy(update={"quantized": True}) for name in chosen}
    return done | {name: known.get(name, dense).model_copy(update={"float_because": reason, "quantized": False})
                   for name, reason in left.items()}  # fmt: skip
