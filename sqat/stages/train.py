"""Dense fine-tuning: the account's first step, and the teacher of all that follow."""

from __future__ import annotations

from sqat.checkpoint.store import Checkpoint
from sqat.compress.losses import task_loss
from sqat.errors import SqatError
from sqat.models.loading import serialize_model
from sqat.recipe.stages import DenseTrainConfig
from sqat.stages.context import StageContext


def run(config: DenseTrainConfig, parent: Checkpoint | None, context: StageContext) -> Checkpoint:
    """Fine-tune the pretrained model (or the parent) on the task."""
    if parent is not None and (parent.masks or parent.amax):
        raise SqatError(f"stage {context.name} would undo the masks or scales of {parent.manifest.stage}",
                        "start from a train stage, or from the pretrained model")  # fmt: skip
    model, processor = context.load_model(parent)
    for remark in context.task.data_warnings(context.splits.prepared("train", processor)):
        context.reporter.info(remark)
    rows, judged = len(context.splits.rows("dev")), len(context.splits.prepared("dev", processor))
    if judged < rows:
        context.reporter.info(f"{rows - judged} of {rows} dev rows are not measured: no metric depends on them")
    fitted = context.fit(model, processor, task_loss(context.task), config)
    metrics = {"dev": context.measure(model, processor, "dev")}
    files, weights = serialize_model(model, processor)
    manifest = context.manifest(config, parent, fitted, metrics=metrics)
    return Checkpoint(manifest, files, weights)
