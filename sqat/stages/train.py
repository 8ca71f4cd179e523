"""The train stage: dense fine-tuning; its model teaches the stages that follow."""

from __future__ import annotations

from sqat.checkpoint.store import Checkpoint
from sqat.errors import SqatError
from sqat.models.loading import serialize_model
from sqat.recipe.stages import DenseTrainConfig
from sqat.stages.context import StageContext


def run(config: DenseTrainConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Fine-tune the pretrained model (or the parent) on the task."""
    if parent is not None and (parent.masks or parent.amax):
        raise SqatError(f"stage {context.name} would undo the masks or scales of {parent.manifest.stage}",
                        "start from a train stage, or from the pretrained model", code="stage-order")  # fmt: skip
    model, processor = context.load_model(parent)
    warnings = context.task.data_warnings(context.splits.prepared("train", processor))
    for warning in [*context.splits.remarks, *warnings]:
        context.reporter.info(warning)
    rows, measured = len(context.splits.rows("dev")), len(context.splits.prepared("dev", processor))
    if measured < rows:
        context.reporter.info(f"{rows - measured} of {rows} dev rows are not measured: no metric depends on them")
    with context.training_loss(model, config, processor) as loss:
        result = context.fit(model, processor, loss, config)
    metrics = {"dev": context.measure(model, processor, "dev")}
    files, weights = serialize_model(model, processor)
    return Checkpoint(context.manifest(config, parent, result, metrics=metrics), files, weights)
