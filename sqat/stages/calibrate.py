"""The calibrate stage: observe rows and choose an amax for every activation site."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sqat.checkpoint.manifest import HISTOGRAMS, LayerRecord, SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.compress.calibrate import Calibration, calibrate, fold_norms_
from sqat.compress.idle_layers import find_idle_layers
from sqat.compress.quantize import quantized_model
from sqat.data.batch import Batch, Processor, plan_batches
from sqat.data.rows import column
from sqat.distributed import process_state
from sqat.export.cpu.encoder import check_encoder
from sqat.models.layer_selection import Choice, choose_layers
from sqat.models.loading import serialize_model
from sqat.modules.batch_norm import round_conv_biases_
from sqat.quantization.histogram import Histogram
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.stages import CalibrateConfig
from sqat.stages.context import StageContext

SHOWN_PERCENTILE = 99.99  # for the pictures of the histograms


def run(config: CalibrateConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Observe ``samples`` rows in eval mode and choose every site's amax; of the weights only batch norms change."""
    model, processor = context.load_model(parent)
    if PLACEMENTS[config.placement].kernels:
        check_encoder(model)
    notes = []
    choice, found = calibrate_on_rows(config, config.placement, model, processor, context)
    if not found.has_attention:
        notes.append(f"{type(model).__name__} has no attention interface: its attention products stay float")
    masks = {} if parent is None else parent.masks
    round_conv_biases_(model, choice.chosen, found.amax, found.shared_with, masks)
    with quantized_model(model, masks, choice.chosen, found.amax, found.shared_with, config.placement):
        metrics = {"dev": context.measure(model, processor, "dev")}
    if found.methods:
        context.reporter.info(f"{context.name}: {count_methods(found)}")
    records = {site: SiteRecord(shared_with=owner, saturated=found.saturated[site], method=found.methods.get(site, ""))
               for site, owner in found.shared_with.items()}  # fmt: skip
    layers = record_layers(parent, choice.chosen, choice.skipped)
    files, weights = serialize_model(model, processor)
    files[HISTOGRAMS] = summarize(found.histograms)
    manifest = context.manifest(config, parent, metrics=metrics, layers=layers, sites=records, skipped=found.skipped,
                                placement=config.placement, notes=notes)  # fmt: skip
    return Checkpoint(manifest, files, weights, masks, found.amax)


def calibrate_on_rows(
    config: CalibrateConfig,
    placement: str,
    model: nn.Module,
    processor: Processor,
    context: StageContext,
) -> tuple[Choice, Calibration]:
    """Choose layers, fold batch norms, and calibrate on the stage's rows; processes share the batches."""
    batches = sample_batches(config, context, processor)
    example = batches[0].inputs
    choice = choose_layers(model, config.layers, "quantize", idle=find_idle_layers(model, example))
    fold_norms_(model, example)
    own = batches[process_state().process_index :: process_state().num_processes]
    found = calibrate(model, show_progress(own, context), config.method, placement, choice.chosen, example)
    return choice, found


def sample_batches(config: CalibrateConfig, context: StageContext, processor: Processor) -> list[Batch]:
    """Take the first ``samples`` rows of a seeded shuffle, in batches of similar length."""
    rows = context.splits.prepared(config.split, processor)
    generator = torch.Generator().manual_seed(context.recipe.seed)
    chosen = torch.randperm(len(rows), generator=generator)[: config.samples].tolist()
    lengths = column(rows, "length").tolist()
    batches = plan_batches(lengths, [[index] for index in chosen], config.batch_size, context.recipe.seed, 0)
    torch.manual_seed(context.recipe.seed)  # for what a processor draws
    return [processor.collate(rows, batch).to(process_state().device) for batch in batches]


def show_progress(batches: list[Batch], context: StageContext) -> Iterator[Mapping[str, Tensor]]:
    """Yield the inputs of each batch, and report it when the next one is asked for."""
    context.reporter.start(context.name, len(batches))
    for step, batch in enumerate(batches, start=1):
        begun = time.monotonic()
        yield batch.inputs
        context.reporter.advance(step, {}, len(batch) / (time.monotonic() - begun))
    context.reporter.finish()


def count_methods(found: Calibration) -> str:
    """Say how many amax each method gave."""
    counts = Counter(found.methods[site] for site in found.amax if site in found.methods)
    return f"amax by {', '.join(f'{method} ({count})' for method, count in counts.most_common())}"


def summarize(histograms: Mapping[str, Histogram]) -> bytes:
    """Content of `HISTOGRAMS`: site -> width and counts of 64 bins of |x|, and the |x| at `SHOWN_PERCENTILE`."""
    found = {}
    for site, histogram in histograms.items():
        width, counts = histogram.summary()
        found[site] = {"width": width, "counts": counts, "covers": histogram.upper_edge(SHOWN_PERCENTILE)}
    return f"{json.dumps(found)}\n".encode()


def record_layers(parent: Checkpoint | None, chosen: list[str], skipped: Mapping[str, str]) -> dict[str, LayerRecord]:
    """Records of the parent's layers, with which of them are quantized now."""
    dense = LayerRecord(dense_because="no prune stage")
    before = {} if parent is None else parent.manifest.layers
    records = {name: before.get(name, dense).model_copy(update={"quantized": True}) for name in chosen}
    return records | {name: before.get(name, dense).model_copy(update={"float_because": reason, "quantized": False})
                      for name, reason in skipped.items()}  # fmt: skip
