"""Dense fine-tuning: the account's first step, and the teacher of all that follow."""

from __future__ import annotations

from sqat.checkpoint.store import Checkpoint
from sqat.compress.losses import task_loss
from sqat.errors import SqatError
from sqat.models.loading import capture
from sqat.recipe.schema import TrainConfig
from sqat.stages.context import Job


def run(config: TrainConfig, parent: Checkpoint | None, job: Job) -> Checkpoint:
    """Fine-tune the pretrained model (or the parent) on the task."""
    if parent is not None and (parent.masks or parent.amax):
        raise SqatError(f"stage {job.name} would undo the masks or scales of {parent.manifest.stage}",
                        "start from a train stage, or from the pretrained model")  # fmt: skip
    model, processor = job.start(parent)
    for remark in job.task.remarks(job.splits.prepared("train", processor)):
        job.display.say(remark)
    rows, judged = len(job.splits.rows("dev")), len(job.splits.prepared("dev", processor))
    if judged < rows:
        job.display.say(f"{rows - judged} of {rows} dev rows are not measured: no metric depends on them")
    fitted = job.fit(model, processor, task_loss(job.task), config)
    metrics = {"dev": job.measure(model, processor, "dev")}
    files, weights = capture(model, processor)
    manifest = job.manifest(config, parent, fitted, metrics=metrics)
    return Checkpoint(manifest, files, weights)
