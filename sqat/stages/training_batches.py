"""Make the training batches of a stage from the rows of its recipe."""

from __future__ import annotations

from sqat.data.batch import Batch, Processor, plan_batches
from sqat.data.pixels import augment_images
from sqat.data.rows import column
from sqat.data.streaming import Stream, StreamedBatches
from sqat.recipe.stages import RowGrouping
from sqat.stages.teacher import OutsideTeacher
from sqat.tasks import group_rows
from sqat.tasks.splits import Splits
from sqat.training.batches import Batches


def make_batches(
    splits: Splits,
    processor: Processor,
    batch_size: int,
    accumulation_steps: int,
    grouping: RowGrouping,
    teacher: OutsideTeacher | None = None,
) -> Batches:
    """Make training batches, a function of seed and epoch.

    Args:
        accumulation_steps: batches that an optimizer step sums up; a stream reads as many at once.
        grouping: which rows share a batch. A stream takes its rows in its order.
        teacher: one that is no stage adds its inputs or outputs to each batch.
    """
    if splits.stream is not None:
        return stream_batches(splits, splits.stream, processor, batch_size, accumulation_steps, teacher)
    rows, task, recipe = splits.prepared("train", processor), splits.task, splits.recipe
    lengths, augment = column(rows, "length").tolist(), recipe.data.augment

    def plan(epoch: int) -> list[list[int]]:
        groups = group_rows(task, grouping, rows, recipe.seed, epoch)
        return plan_batches(lengths, groups, batch_size, recipe.seed, epoch)

    def collate(indices: list[int]) -> Batch:
        batch = processor.collate(rows, indices)
        batch = batch if teacher is None else teacher.add_to(batch, rows, indices)
        return batch if augment is None else augment_images(batch, augment.shift, augment.flip)

    return Batches(plan, collate)


def stream_batches(
    splits: Splits,
    stream: Stream,
    processor: Processor,
    batch_size: int,
    accumulation_steps: int,
    teacher: OutsideTeacher | None,
) -> Batches:
    """Make training batches of a stream, read when they are needed."""
    streamed = StreamedBatches(stream, batch_size, splits.task.encode, accumulation_steps)

    def collate(numbers: list[int]) -> Batch:
        rows = processor.prepare(streamed.pick(numbers), splits.recipe.model.max_length)
        indices = list(range(len(rows)))
        batch = processor.collate(rows, indices)
        return batch if teacher is None else teacher.add_to(batch, rows, indices)

    return Batches(streamed.plan, collate)
