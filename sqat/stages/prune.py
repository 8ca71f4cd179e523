"""Progressive N:M pruning: a growing mask over the surviving weights, fine-tuning between (source: NVIDIA/Tencent).

The mask of step i is set before one training step and holds in every forward pass after it; the last one
is set when ``recovery_fraction`` of the steps remain. One-shot pruning is the schedule with one step. Channels are
permuted, where that is asked for, before the first mask; a resumed stage does so again, then reads the weights it had.
"""

from __future__ import annotations

from functools import partial

import torch

from sqat.checkpoint.manifest import LayerRecord
from sqat.checkpoint.store import Checkpoint
from sqat.compress.losses import stage_loss
from sqat.compress.masking import Masking, with_decay
from sqat.compress.patterns import choose_patterns
from sqat.compress.permuting import permute_for_
from sqat.compress.statistics import gather
from sqat.errors import SqatError
from sqat.models.loading import serialize_model
from sqat.modules.parametrize import insert_weights_, layer, remove_weights_
from sqat.recipe.stages import PruneConfig
from sqat.sparsity.schedules.schedule import describe_skipped_masks
from sqat.stages.context import StageContext


def run(config: PruneConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Prune the chosen layers step by step, fine-tuning on the task (and distilling, by choice)."""
    if parent is not None and parent.amax:
        raise SqatError(f"stage {context.name} would undo the scales of {parent.manifest.stage}",
                        "prune before calibrating")  # fmt: skip
    model, processor = context.load_model(parent)
    patterns, left = choose_patterns(model, config)
    old = {} if parent is None else parent.masks
    masks = {name: old.get(name, torch.ones_like(layer(model, name).weight, dtype=torch.bool)).clone()
             for name in patterns}  # fmt: skip
    kept = {name: mask for name, mask in old.items() if name not in masks}
    learns_all = config.schedule.every_step
    feed, notes = context.training_batches(config, processor), [] if parent is None else list(parent.manifest.notes)
    moments = config.schedule.mask_steps(context.total_steps(config, feed), config.recovery_fraction)
    if remark := describe_skipped_masks(moments):
        context.reporter.info(f"{context.name}: {remark}")
    with stage_loss(model, config.distill, context.task, context.teacher, context.name) as loss:
        gathered = partial(gather, config.criterion, model, loss=loss, feed=feed, seed=context.recipe.seed)
        if config.permute:
            notes += permute_for_(
                config, model, patterns, old, feed, gathered, context.recipe.seed, context.reporter, context.name
            )
        transforms = insert_weights_(model, {**masks, **kept}, (), masks if learns_all else ())
        masking = Masking(model, {name: transforms[name] for name in masks}, patterns, config, moments, gathered)
        fitted = context.fit(model, processor, with_decay(loss, masking), config, masking.before_step,
                         best_from_step=0 if learns_all else max(moments))  # fmt: skip
    masks = {name: mask.cpu() for name, mask in remove_weights_(model, transforms).items()}
    metrics = {"dev": context.measure(model, processor, "dev")}
    layers = {name: LayerRecord(pattern=str(pattern)) for name, pattern in patterns.items()}
    layers |= {name: LayerRecord(dense_because=reason) for name, reason in left.items()}
    if parent is not None:
        layers |= {name: parent.manifest.layers[name] for name in kept}
    files, weights = serialize_model(model, processor)
    manifest = context.manifest(config, parent, fitted, metrics=metrics, layers=layers, notes=notes)
    return Checkpoint(manifest, files, weights, masks)
