"""The plan of a run: which stages must run, and how much work each is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sqat.data.batch import check_group_size
from sqat.errors import SqatError
from sqat.pipeline.graph import StageGraph, StageNode, resolve_graph
from sqat.pipeline.quality_gates import describe_gates, predicted_failure
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import (
    CalibrateConfig,
    ReconstructConfig,
    StageConfig,
    TrainConfig,
    distill_config,
    row_grouping,
)
from sqat.tasks.splits import Splits


@dataclass(frozen=True)
class PlannedStage:
    """One stage as the plan shows it.

    Attributes:
        unchanged: whether it is skipped.
        seconds: of its last run; None where it has not run.
        failed_gate: gate that its unchanged result misses, in words.
        teacher: what teaches it; None where it does not distil.
    """

    number: int
    name: str
    type: str
    parent: str | None
    fingerprint: str
    directory: Path
    unchanged: bool
    steps: int | None
    samples: int | None
    seconds: float | None
    gates: list[str] = field(default_factory=list)
    failed_gate: str = ""
    teacher: str | None = None


def make_plan(
    loaded: LoadedRecipe, *, first: str | None = None, last: str | None = None, force: bool = False
) -> list[PlannedStage]:
    """Plan the stages from ``first`` to ``last`` without running any."""
    graph, splits = resolve_graph(loaded), Splits(loaded.recipe, loaded.path.parent)
    check_data(splits)
    pending, numbers = pending_stages(graph, first, last, force), list(graph.nodes)
    plan = []
    for node in graph.select(first, last):
        steps, samples = count_work(node.config, splits)
        unchanged = node not in pending
        plan.append(
            PlannedStage(
                number=numbers.index(node.name) + 1,
                name=node.name,
                type=node.config.type,
                parent=node.parent.name if node.parent else None,
                teacher=node.teacher_label,
                fingerprint=node.fingerprint,
                directory=node.directory,
                unchanged=unchanged,
                steps=steps,
                samples=samples,
                seconds=node.manifest.seconds if node.manifest else None,
                gates=describe_gates(node),
                failed_gate=predicted_failure(graph, node) if unchanged else "",
            )
        )
    return plan


def check_data(splits: Splits) -> None:
    """Read every split and refuse what its stages would refuse later.

    Raises:
        SqatError: a row is wrong, dev or test has a class that train lacks, or a query does not fit into a batch.
    """
    splits.check()
    for config in splits.recipe.stages.values():
        if isinstance(config, TrainConfig):
            check_groups(splits, config)


def check_groups(splits: Splits, config: TrainConfig) -> None:
    """Refuse batches that are too small for a query, and a loss between passages where no query has two.

    Raises:
        SqatError: it is one of these.
    """
    grouping, distill = row_grouping(config), distill_config(config)
    largest = splits.epoch_sizes(grouping)[1]
    check_group_size(largest, config.batch_size)
    if distill is not None and grouping == "queries" and largest < 2:
        raise SqatError(f"distill.output_loss {distill.output_loss} compares the passages of a query, and each query "
                        "of train has one", "set distill.output_loss: mse", code="recipe-conflict")  # fmt: skip


def pending_stages(graph: StageGraph, first: str | None, last: str | None, force: bool) -> list[StageNode]:
    """Return the stages that must run: forced, not current, or after one that runs."""
    pending: list[StageNode] = []
    for node in graph.select(first, last):
        if force or node.parent in pending or node.teacher in pending or not node.is_current:
            pending.append(node)
    return pending


def count_work(config: StageConfig, splits: Splits) -> tuple[int | None, int | None]:
    """Return the optimizer steps and samples of a stage, as if all batches were full."""
    if isinstance(config, TrainConfig):
        batches = -(-splits.epoch_sizes(row_grouping(config))[0] // config.batch_size)
        steps = config.total_steps(batches, config.gradient_accumulation)
        return steps, steps * config.batch_size * config.gradient_accumulation
    if isinstance(config, ReconstructConfig):
        return None, min(config.samples, len(splits.rows("train")))
    if isinstance(config, CalibrateConfig):
        return None, min(config.samples, len(splits.rows(config.split)))
    return None, min(config.parity_samples, len(splits.rows("dev")))
