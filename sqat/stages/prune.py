"""The prune stage: masks that grow to N:M over the first steps, and training with them in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sqat.checkpoint.manifest import LayerRecord
from sqat.checkpoint.store import Checkpoint
from sqat.compress.eval_mode import eval_mode
from sqat.compress.idle_layers import find_idle_layers
from sqat.compress.mask_schedule import MaskSchedule, with_mask_decay
from sqat.compress.patterns import choose_patterns
from sqat.compress.permute import fixed_by_relation_heads, permute_
from sqat.compress.statistics import collect_statistics, first_batches
from sqat.distributed import process_state
from sqat.errors import SqatError
from sqat.models.loading import serialize_model
from sqat.recipe.stages import PruneConfig
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.schedules.schedule import describe_skipped_masks
from sqat.stages.context import StageContext
from sqat.stages.reconstruct import blocks_state, describe, reconstruct
from sqat.training.batches import Batches
from sqat.training.data_parallel import Loss

EXAMPLE_ROWS = 2  # on which idle layers and channel groups are found


def run(config: PruneConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Prune the chosen layers step by step while training on the task, with distillation where it is asked for."""
    if parent is not None and parent.amax:
        raise SqatError(f"stage {context.name} would undo the scales of {parent.manifest.stage}",
                        "prune before calibrating", code="stage-order")  # fmt: skip
    model, processor = context.load_model(parent)
    batches = context.training_batches(config, processor)
    idle = find_idle_layers(model, example_inputs(model, batches, context.recipe.seed))
    patterns, skipped = choose_patterns(model, config.layers, config.pattern, config.patterns, idle)
    mask_steps = config.schedule.mask_steps(context.total_steps(config, batches), config.recovery_fraction)
    if warning := describe_skipped_masks(mask_steps):
        context.reporter.info(f"{context.name}: {warning}")
    old = {} if parent is None else parent.masks
    with context.training_loss(model, config, processor) as loss:
        masks, notes = start_pruning(config, model, patterns, mask_steps, batches, loss, context, old)

        def before_step(step: int) -> None:
            masks.before_step(step)
            if config.reconstruct is not None and step == max(mask_steps):
                reconstruct(config.reconstruct, model, processor, context, within=True)
                context.reporter.start(context.name, context.total_steps(config, batches))

        best_from_step = 0 if config.schedule.every_step else max(mask_steps)
        result = context.fit(model, processor, with_mask_decay(loss, masks), config, before_step, best_from_step)
    if (blocks := blocks_state(context).peek()) is not None:
        notes.append(describe(blocks.history))
    final = masks.remove()
    metrics = {"dev": context.measure(model, processor, "dev")}
    layers = record_layers(parent, patterns, skipped, old)
    files, weights = serialize_model(model, processor)
    manifest = context.manifest(config, parent, result, metrics=metrics, layers=layers, notes=notes)
    return Checkpoint(manifest, files, weights, final)


def start_pruning(
    config: PruneConfig,
    model: nn.Module,
    patterns: Mapping[str, Pattern],
    mask_steps: Mapping[int, int],
    batches: Batches,
    loss: Loss,
    context: StageContext,
    masks: Mapping[str, Tensor],
) -> tuple[MaskSchedule, list[str]]:
    """Permute channels, where the stage does, and insert masks; returns them and notes.

    A resumed stage permutes in the same way, then reads the weights that it had.

    Args:
        masks: of layers that are already pruned.
    """
    criterion, seed, notes = config.criterion, context.recipe.seed, list[str]()

    def collect(owners: Mapping[str, str]) -> dict[str, Tensor]:
        rows = first_batches(batches, criterion.samples, seed)
        return collect_statistics(criterion, model, owners, loss, rows, seed)

    if config.permute:
        fixed = dict.fromkeys(masks, "it has a mask already")
        if config.distill is not None and config.distill.minilm_weight:
            distill = config.distill
            fixed |= fixed_by_relation_heads(model, distill.loss.relation_heads, distill.qkv)
        notes = permute_(model, example_inputs(model, batches, seed), patterns, criterion, collect, fixed)
        context.reporter.info(f"{context.name}: {notes[0]}")
    return MaskSchedule(model, patterns, criterion, config.schedule, mask_steps, collect, masks), notes


def example_inputs(model: nn.Module, batches: Batches, seed: int) -> Mapping[str, Tensor]:
    """Inputs of the first training rows; training draws as if they had not been read."""
    with eval_mode(model, seed):
        rows = next(iter(batches.stream(0)))[:EXAMPLE_ROWS]
        return batches.collate(rows).to(process_state().device).inputs


def record_layers(
    parent: Checkpoint | None, patterns: Mapping[str, Pattern], skipped: Mapping[str, str], old: Mapping[str, Tensor]
) -> dict[str, LayerRecord]:
    """Records of all layers; those that an earlier stage alone pruned keep theirs."""
    layers = {name: LayerRecord(pattern=str(pattern)) for name, pattern in patterns.items()}
    layers |= {name: LayerRecord(dense_because=reason) for name, reason in skipped.items()}
    if parent is not None:
        layers |= {name: parent.manifest.layers[name] for name in old if name not in patterns}
    return layers
