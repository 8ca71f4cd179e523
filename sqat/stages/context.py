"""What a stage has at hand: the recipe, the rows, its ancestors and the reporter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from sqat.checkpoint.manifest import Manifest
from sqat.checkpoint.store import Checkpoint
from sqat.compress.training_losses import distilled_loss, task_loss
from sqat.data.batch import Processor
from sqat.data.rows import SplitName
from sqat.data.tokens import TextProcessor
from sqat.distributed import broadcast_from_rank0
from sqat.errors import SqatError
from sqat.evaluation.inference import logits_of, move_to_device, predict
from sqat.export.traced_graphs import TracedGraphs
from sqat.models.loading import build, check_head, load_pretrained, versions
from sqat.progress import Reporter
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import StageConfig, TrainConfig, distill_config, learns_from_labels, row_grouping
from sqat.stages.teacher import OutsideTeacher, load_outside_teacher
from sqat.stages.training_batches import make_batches
from sqat.tasks import Task
from sqat.tasks.splits import Splits
from sqat.training.batches import Batches
from sqat.training.data_parallel import Loss
from sqat.training.loop import TrainResult, fit
from sqat.training.metrics_log import MetricsLog
from sqat.training.resume import Evaluation, Metrics, resolve_accumulation_steps
from sqat.training.resume_state import ResumeState

INHERITED = ("layers", "sites", "skipped", "placement")  # entries of a manifest that children keep


@dataclass(frozen=True)
class StageContext:
    """What one stage asks for: a model, batches, training, metrics and a manifest.

    Attributes:
        input_digests: digests of the parent's and the teacher's manifests.
        state: of an unfinished training, to resume from.
        teacher: loads the dense ancestor that teaches this stage.
        log: gets the losses and metrics of every training step.
        graphs: in a rehearsal, remembers the float graphs of exports.
    """

    name: str
    fingerprint: str
    input_digests: dict[str, str]
    splits: Splits
    reporter: Reporter
    state: ResumeState
    teacher: Callable[[], Checkpoint]
    log: MetricsLog | None = None
    graphs: TracedGraphs | None = None
    teachers: list[OutsideTeacher] = field(default_factory=list, repr=False)  # at most one, once it is loaded

    @property
    def recipe(self) -> Recipe:
        """The recipe that the stage belongs to."""
        return self.splits.recipe

    @property
    def is_rehearsal(self) -> bool:
        """Whether the stage runs on a few rows, which are too few for metrics and decisions."""
        return self.splits.limit is not None

    @property
    def task(self) -> Task:
        """The task, with the classes and grades of the train rows."""
        return self.splits.task

    def load_model(self, parent: Checkpoint | None) -> tuple[nn.Module, Processor]:
        """Load the parent's model and processor, or the recipe's pretrained model with a head for the task.

        Raises:
            SqatError: the parent holds no torch weights, or its head is not the task's.
        """
        task = self.task
        if parent is not None:
            place = f"the checkpoint that stage {self.name} starts from"
            if not parent.weights:
                raise SqatError("it is an export without torch weights", "start from an earlier stage", place,
                                code="not-a-checkpoint")  # fmt: skip
            check_head(parent.files["config.json"], task.outputs, task.config_fields, place)
            return move_to_device(*build(parent, place))
        head = {"num_labels": task.outputs, **task.config_fields}
        stage = self.recipe.stages[self.name]
        model, processor = load_pretrained(
            task.architecture,
            self.recipe.model,
            self.splits.folder,
            head,
            self.recipe.seed,
            is_trained=isinstance(stage, TrainConfig) and stage.steps != 0 and learns_from_labels(stage),
            report=lambda line: self.reporter.info(f"{self.name}: {line}"),
        )
        if isinstance(processor, TextProcessor):
            tokenizer = processor.tokenizer
            if tokenizer.eos_token and tokenizer.eos_token == tokenizer.pad_token:
                self.reporter.info(f"{self.name}: texts are padded with the end token {tokenizer.eos_token}")
        return move_to_device(model, processor)

    def training_batches(self, config: TrainConfig, processor: Processor) -> Batches:
        """Training batches, a function of seed and epoch."""
        return make_batches(
            self.splits,
            processor,
            config.batch_size,
            self.accumulation_steps(config),
            row_grouping(config),
            self.outside_teacher(config, processor),
        )

    def outside_teacher(self, config: TrainConfig, processor: Processor) -> OutsideTeacher | None:
        """Load the teacher of a stage that no stage teaches, once; None where it has none."""
        distill = distill_config(config)
        if distill is None or distill.teacher is None or distill.teacher.stage is not None:
            return None
        if not self.teachers:
            self.teachers.append(load_outside_teacher(distill.teacher, distill, self.splits, processor))
        return self.teachers[0]

    def accumulation_steps(self, config: TrainConfig) -> int:
        """How many batches an optimizer step sums up, over all processes."""
        return resolve_accumulation_steps(config, self.state)

    def total_steps(self, config: TrainConfig, batches: Batches) -> int:
        """How many optimizer steps the stage trains."""
        return config.total_steps(len(batches.plan(0)), self.accumulation_steps(config))

    @contextmanager
    def training_loss(self, model: nn.Module, config: TrainConfig, processor: Processor) -> Iterator[Loss]:
        """The task's loss, or the distilled one while the teacher is loaded."""
        distill = distill_config(config)
        if distill is None:
            yield task_loss(self.task)
            return
        outside = self.outside_teacher(config, processor)
        teacher = build(self.teacher())[0].requires_grad_(False) if outside is None else outside.model
        with distilled_loss(model, teacher, distill, self.task) as loss:
            yield loss

    def fit(
        self,
        model: nn.Module,
        processor: Processor,
        loss: Loss,
        config: TrainConfig,
        before_step: Callable[[int], None] | None = None,
        best_from_step: int = 0,
    ) -> TrainResult:
        """Train a model in place on the train split, from the resume state where there is one."""
        batches = self.training_batches(config, processor)
        return fit(
            model,
            loss,
            batches,
            config,
            steps=self.total_steps(config, batches),
            seed=self.recipe.seed,
            title=self.name,
            reporter=self.reporter,
            state=self.state,
            evaluation=Evaluation(partial(self.measure, model, processor, "dev"), self.task.metric),
            before_step=before_step,
            best_from_step=best_from_step,
            log=self.log,
        )

    def measure(self, model: nn.Module, processor: Processor, split: SplitName) -> Metrics:
        """Compute the task's metrics of a model on a split, the same in all processes; a rehearsal has none."""
        rows = self.splits.prepared(split, processor)
        logits = predict(partial(logits_of, model.eval()), rows, processor)
        if self.is_rehearsal:
            return {}
        metrics = self.task.metrics(logits, rows)
        shared: Metrics = json.loads(broadcast_from_rank0(json.dumps(metrics)))
        return shared

    def manifest(
        self,
        config: StageConfig,
        parent: Checkpoint | None,
        result: TrainResult | None = None,
        notes: Sequence[str] = (),
        **entries: Any,
    ) -> Manifest:
        """Make the manifest of the stage's checkpoint from the parent's, with more notes and other ``entries``."""
        inherited: dict[str, Any] = {}
        if parent is not None:
            inherited = {name: getattr(parent.manifest, name) for name in INHERITED}
            notes = [*parent.manifest.notes, *notes]
        trained = {} if result is None else vars(result)
        return Manifest(
            stage=self.name,
            type=config.type,
            fingerprint=self.fingerprint,
            input_digests=self.input_digests,
            base_model=self.recipe.model.label,
            seed=self.recipe.seed,
            versions=versions(),
            notes=list(notes),
            **{**inherited, **trained, **entries},
        )
