"""What a stage has at hand while it runs: the recipe, the rows, its ancestors and its watcher."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sqat.checkpoint.manifest import Manifest
from sqat.checkpoint.store import Checkpoint
from sqat.data.dataset import (
    Batch,
    Processor,
    SplitName,
    TextProcessor,
    column,
    plan_batches,
)
from sqat.data.pixels import augmented
from sqat.data.streaming import Stream, StreamedBatches
from sqat.distributed import broadcast_from_rank0
from sqat.errors import SqatError
from sqat.evaluation.inference import logits_of, on_device, predict
from sqat.models.loading import build, check_head, load_pretrained, versions
from sqat.progress import Reporter
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import PruneConfig, QatConfig, StageConfig, TrainConfig
from sqat.tasks import Task
from sqat.tasks.splits import Splits
from sqat.training.batches import Batches
from sqat.training.data_parallel import Loss
from sqat.training.loop import Evaluation, Metrics, TrainResult, fit, resolve_accumulation_steps
from sqat.training.resume_state import ResumeState


@dataclass(frozen=True)
class StageContext:
    """One stage's surroundings.

    Attributes:
        name: of the stage.
        made_from: digests of the parent's and the teacher's manifests.
        teacher: loads the dense ancestor that teaches this stage.
    """

    recipe: Recipe
    folder: Path
    name: str
    key: str
    made_from: dict[str, str]
    splits: Splits
    reporter: Reporter
    state: ResumeState
    teacher: Callable[[], Checkpoint]

    @property
    def task(self) -> Task:
        return self.splits.task

    def load_model(self, parent: Checkpoint | None) -> tuple[nn.Module, Processor]:
        """Model and processor to begin with: the parent's, or the recipe's model with a fresh head.

        Raises:
            SqatError: the parent holds no torch weights, or its head is not the task's.
        """
        task = self.task
        if parent is not None:
            place = f"the checkpoint that stage {self.name} starts from"
            if not parent.weights:
                raise SqatError("it is an export without torch weights", "start from an earlier stage", place)
            check_head(parent.files["config.json"], task.outputs, task.config_fields, place)
            return on_device(*build(parent, place))
        head = {"num_labels": task.outputs, **task.config_fields}
        model, words = load_pretrained(task.architecture, self.recipe.model, self.folder, head, self.recipe.seed)
        if isinstance(words, TextProcessor) and (end := words.tokenizer.eos_token) == words.tokenizer.pad_token and end:
            self.reporter.info(f"{self.name}: texts are padded with the end token {end}")
        return on_device(model, words)

    def training_batches(self, config: TrainConfig, processor: Processor) -> Batches:
        """Training batches: a function of (seed, epoch)."""
        if self.splits.stream is not None:
            return self.streamed(self.splits.stream, config, processor)
        rows, task, seed = self.splits.prepared("train", processor), self.task, self.recipe.seed
        lengths = column(rows, "length").tolist()

        def plan(epoch: int) -> list[list[int]]:
            units = (
                task.training_groups(rows, seed, epoch) if needs_labels(config) else [[row] for row in range(len(rows))]
            )
            return plan_batches(lengths, units, config.batch_size, seed, epoch)

        def batch(indices: list[int]) -> Batch:
            found, how = processor.collate(rows, indices), self.recipe.data.augment
            return found if how is None else augmented(found, how.shift, how.flip)

        return Batches(plan, batch)

    def streamed(self, stream: Stream, config: TrainConfig, processor: Processor) -> Batches:
        """Training batches that are read as they are needed."""
        at_once = resolve_accumulation_steps(config, self.state)
        batches = StreamedBatches(stream, config.batch_size, self.task.encode, at_once)

        def batch(numbers: list[int]) -> Batch:
            rows = processor.prepare(batches.pick(numbers), self.recipe.model.max_length)
            return processor.collate(rows, list(range(len(rows))))

        return Batches(batches.plan, batch)

    def total_steps(self, config: TrainConfig, feed: Batches) -> int:
        """Optimizer steps of a fit, whose batches all processes share."""
        return config.total_steps(len(feed.plan(0)), resolve_accumulation_steps(config, self.state))

    def fit(
        self,
        model: nn.Module,
        processor: Processor,
        loss: Loss,
        config: TrainConfig,
        before_step: Callable[[int], None] | None = None,
        best_from_step: int = 0,
    ) -> TrainResult:
        """Train ``model`` on the train split with this stage's seed, watcher and mid-stage state."""
        feed = self.training_batches(config, processor)
        return fit(
            model,
            loss,
            feed,
            config,
            steps=self.total_steps(config, feed),
            seed=self.recipe.seed,
            title=self.name,
            reporter=self.reporter,
            state=self.state,
            evaluation=Evaluation(partial(self.measure, model, processor, "dev"), self.task.metric),
            before_step=before_step,
            best_from_step=best_from_step,
        )

    def measure(self, model: nn.Module, processor: Processor, split: SplitName) -> Metrics:
        """The task's metrics of a torch model on a split, as the first process finds them."""
        rows = self.splits.prepared(split, processor)
        figures = self.task.metrics(predict(partial(logits_of, model.eval()), rows, processor), rows)
        found: Metrics = json.loads(broadcast_from_rank0(json.dumps(figures)))
        return found

    def manifest(
        self, config: StageConfig, parent: Checkpoint | None, fitted: TrainResult | None = None, **entries: Any
    ) -> Manifest:
        """Manifest of this stage's checkpoint; what the parent knows of layers and sites is handed on."""
        known: dict[str, Any] = {
            "base_model": self.recipe.model.label,
            "seed": self.recipe.seed,
            "versions": versions(),
        }
        if parent is not None:
            handed_on = ("layers", "sites", "skipped", "placement", "notes")
            known |= {name: getattr(parent.manifest, name) for name in handed_on}
        if fitted is not None:
            known |= vars(fitted)
        return Manifest(
            stage=self.name, type=config.type, key=self.key, input_digests=self.made_from, **{**known, **entries}
        )


def needs_labels(config: TrainConfig) -> bool:
    """Whether a stage learns from labels; one that only imitates its teacher takes every row, and each alone."""
    distill = config.distill if isinstance(config, PruneConfig | QatConfig) else None
    return distill is None or distill.task_weight > 0
