"""The reconstruct stage: each block learns to give the dense block's output, on train rows without their labels.

A prune stage may do the same after its last mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from sqat.checkpoint.store import Checkpoint
from sqat.compress.eval_mode import eval_mode
from sqat.compress.quantize import masked_model
from sqat.compress.reconstruct import AFTER, BEFORE, Reconstruction, without_dropout
from sqat.data.batch import Batch, Processor, plan_batches
from sqat.data.rows import column
from sqat.distributed import process_state, uses_fsdp
from sqat.errors import SqatError
from sqat.evaluation.evaluate import quantize_as_calibrated
from sqat.evaluation.inference import move_to_device
from sqat.models.loading import build, serialize_model
from sqat.recipe.stages import ReconstructConfig, ReconstructionConfig
from sqat.stages.context import StageContext
from sqat.training.batches import Batches, seed_torch
from sqat.training.loop import TrainResult, fit
from sqat.training.resume import Evaluation, Metrics
from sqat.training.resume_state import ResumeState
from sqat.training.step import autocast

NUM_EXAMPLES = 8  # batches on which blocks are measured


def run(config: ReconstructConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Train the parent block by block with its masks, and its quantizers where it is calibrated, in place."""
    if parent is None or not (parent.masks or parent.amax):
        raise SqatError(f"stage {context.name} needs masks or activation scales",
                        "put a prune or calibrate stage before it", code="stage-order")  # fmt: skip
    model, processor = context.load_model(parent)
    with quantize_as_calibrated(model, parent) if parent.amax else masked_model(model, parent.masks):
        result = reconstruct(config, model, processor, context)
        metrics = {"dev": context.measure(model, processor, "dev")}
    files, weights = serialize_model(model, processor)
    manifest = context.manifest(config, parent, result, metrics=metrics, notes=[describe(result.history)])
    return Checkpoint(manifest, files, weights, parent.masks, parent.amax)


def reconstruct(
    config: ReconstructionConfig, model: nn.Module, processor: Processor, context: StageContext, *, within: bool = False
) -> TrainResult:
    """Train a model block by block towards its dense ancestor; masks and quantizers are in place.

    Args:
        within: this is a part of a stage, which goes on afterwards.

    Returns:
        What training did; its history has the errors of each block.
    """
    if uses_fsdp():
        raise SqatError("reconstruct ends each forward pass within the model, which FSDP cannot",
                        "start without --use_fsdp", code="recipe-conflict")  # fmt: skip
    batches, seed, training = row_batches(config, processor, context), context.recipe.seed, config.training()
    examples = [batches.collate(rows).to(process_state().device) for rows in batches.plan(0)[:NUM_EXAMPLES]]
    state = blocks_state(context) if within else context.state
    teacher, _ = move_to_device(*build(context.teacher()))
    with eval_mode(model), without_dropout(model):  # the rest of a stage goes on in train mode
        blocks = Reconstruction(model, teacher.requires_grad_(False), examples, config.steps_per_block)

        def measure() -> dict[str, float]:
            with autocast(config.precision, process_state().device):
                return blocks.measure()

        result = fit(
            model,
            blocks.loss,
            batches,
            training,
            steps=blocks.steps,
            seed=seed,
            title=f"{context.name}: blocks" if within else context.name,
            reporter=context.reporter,
            state=state,
            evaluation=Evaluation(measure, AFTER),
            before_step=blocks.before_step,
            best_from_step=blocks.steps,
            lr_period=config.steps_per_block,
            save_end=within,
            log=None if within else context.log,
        )
    context.reporter.info(f"{context.name}: {describe(result.history)}")
    return result


def blocks_state(context: StageContext) -> ResumeState:
    """Return the state of the reconstruction within a stage."""
    return context.state.part("reconstruct")


def row_batches(config: ReconstructionConfig, processor: Processor, context: StageContext) -> Batches:
    """Batches of the first ``samples`` rows of a seeded shuffle: the same ones in each epoch, in another order."""
    rows, seed = context.splits.prepared("train", processor), context.recipe.seed
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = shuffled[: config.samples].tolist()
    lengths = column(rows, "length").tolist()
    batches = plan_batches(lengths, [[row] for row in chosen], config.batch_size, seed, 0)

    def plan(epoch: int) -> list[list[int]]:
        order = np.random.default_rng((seed, epoch)).permutation(len(batches))
        return [batches[number] for number in order]

    def collate(chosen: list[int]) -> Batch:
        seed_torch(seed, chosen[0])  # what a processor draws (noise) belongs to the batch: its outputs are remembered
        batch = processor.collate(rows, chosen)
        return Batch(batch.inputs, torch.tensor(chosen), batch.groups)

    return Batches(plan, collate)


def describe(history: Sequence[Metrics]) -> str:
    """Say how near the blocks came to the dense ones."""
    before, after = (np.mean([entry[name] for entry in history]) for name in (BEFORE, AFTER))
    return f"reconstructed {len(history)} blocks: mean error of their outputs {before:.2g} -> {after:.2g}"
