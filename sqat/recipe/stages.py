"""The stages of a recipe: train, prune, reconstruct, calibrate, qat and export, with their gates.

The settings of a part (criterion, schedule, calibrator, loss, target) live in the file of the part and come here by
the table of its room. A ValueError starts with the key that it is about.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, field_serializer, model_validator

from sqat.distillation import LIST_LOSSES, LOSSES, OutputLossName, RelationLoss
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.quantization.calibrators import CALIBRATORS, Calibrator
from sqat.quantization.calibrators.percentile import Percentile
from sqat.quantization.placement import PlacementName
from sqat.recipe.fields import STRICT, OneOf, PatternOrDense, PatternText, Range
from sqat.recipe.targets import TARGETS
from sqat.recipe.teacher import Teacher
from sqat.sparsity.criteria import CRITERIA, Criterion
from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.schedules import SCHEDULES, Schedule
from sqat.sparsity.schedules.per_group import PerGroup

STAGE_TYPES = ("train", "prune", "reconstruct", "calibrate", "qat", "export")
RowGrouping = Literal["queries", "labels", "rows"]
TYPE_WORDS = "type of the stage; default: its name"
if TYPE_CHECKING:
    TargetName = str
else:
    TargetName = Literal[tuple(TARGETS)]


class Gate(BaseModel):
    """What a metric must reach on dev; of several limits the highest counts."""

    model_config = STRICT

    min: float | None = Field(default=None, description="lowest value that passes")
    max_drop: float | None = Field(default=None, ge=0, description="largest drop below the same metric of 'against'")
    against: str | None = Field(default=None, description="stage to compare with; default: the one it starts from")

    @model_validator(mode="after")
    def check_limits(self) -> Gate:
        if self.min is None and self.max_drop is None:
            raise ValueError("a gate needs min, max_drop or both")
        if self.against is not None and self.max_drop is None:
            raise ValueError("against belongs to max_drop, which is not given")
        return self


class Retry(BaseModel):
    """More attempts for a stage that misses its gates, each with more steps than the one before."""

    model_config = STRICT

    times: int = Field(default=1, ge=1, le=10, description="attempts after the first")
    steps_multiplier: float = Field(default=2.0, gt=1, le=100, description="factor on the steps per attempt")


class BaseStage(BaseModel):
    """The keys of every stage."""

    model_config = STRICT

    parent: str | None = Field(
        default=None,
        alias="from",
        description="stage to start from; default: the nearest earlier stage that is no export",
    )
    gates: dict[str, Gate] = Field(
        default={}, description="metric -> limit on dev; a result below it is set aside and the run stops (exit code 3)"
    )

    @property
    def max_attempts(self) -> int:
        """How often the stage may try to pass its gates."""
        return 1

    def retry_multiplier(self, attempt: int) -> float:
        """Factor on the steps of an attempt; the first is 1."""
        return 1.0


class TrainConfig(BaseStage):
    """The settings of the training loop, which every stage that trains has."""

    epochs: float | None = Field(default=None, gt=0, description="passes over train (default 1); give epochs or steps")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; give epochs or steps")
    batch_size: int = Field(default=32, ge=1, description="rows per device and forward pass")
    gradient_accumulation: int = Field(default=1, ge=1, description="batches summed up to one optimizer step")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="optimizer of the weights")
    learning_rate: float = Field(default=5e-5, gt=0, description="highest learning rate")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="rate after the warm-up")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(default=0.01, ge=0, description="decay of all weights but biases and norms")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are clipped to this norm; null: not")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast, weights stay fp32")
    evaluate_every: int | None = Field(default=None, ge=1, description="steps between dev evaluations")
    early_stopping: int | None = Field(default=None, ge=1, description="evaluations without improvement to wait")
    keep_checkpoint: Literal["last", "best"] = Field(default="last", description="step whose weights are returned")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of the running mean of the weights, which is returned; null: the last",
    )
    save_every: float = Field(default=60.0, ge=0, description="seconds between saved states; 0: every step")
    retry: Retry | None = Field(default=None, description="further attempts after a missed gate; default: none")

    @model_validator(mode="after")
    def check_steps_and_retry(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("steps and epochs exclude each other: give one of them (null for the other)")
        if self.early_stopping is not None and self.evaluate_every is None:
            raise ValueError("early_stopping needs evaluate_every, the steps between two evaluations")
        if self.ema is not None and self.keep_checkpoint == "best":
            raise ValueError("ema and keep_checkpoint: best exclude each other: dev measures the weights of a step")
        if self.retry is not None and not self.gates:
            raise ValueError("retry needs gates, which say when to try again")
        return self

    def total_steps(self, batches: int, accumulation_steps: int) -> int:
        """Optimizer steps of a stage whose epoch has ``batches`` batches."""
        if self.steps is not None:
            return self.steps
        return max(1, ceil((self.epochs or 1.0) * batches / accumulation_steps))

    @property
    def max_attempts(self) -> int:
        """How often the stage may try to pass its gates."""
        return 1 if self.retry is None else 1 + self.retry.times

    def retry_multiplier(self, attempt: int) -> float:
        """Factor on the steps of an attempt; the first is 1."""
        return 1.0 if self.retry is None else self.retry.steps_multiplier ** (attempt - 1)

    def for_attempt(self, attempt: int) -> TrainConfig:
        """Settings of an attempt: ``retry`` multiplies its steps."""
        factor = self.retry_multiplier(attempt)
        if factor == 1:
            return self
        if self.steps is not None:
            return self.model_copy(update={"steps": round(self.steps * factor)})
        return self.model_copy(update={"epochs": (self.epochs or 1.0) * factor})


class Layers(BaseModel):
    """The linear layers and convolutions that a stage treats, by glob over module names."""

    model_config = STRICT

    include: tuple[str, ...] | None = Field(default=None, description="default: encoder linears that rule B8 allows")
    exclude: tuple[str, ...] = Field(default=(), description="removed from what include selects")


class DistillConfig(BaseModel):
    """Distillation: MiniLM relations, hidden states and outputs of a teacher, beside the task loss."""

    model_config = STRICT

    loss: Annotated[RelationLoss, OneOf(LOSSES)] = Field(
        default=MiniLMv2(), description="relations of q, k and v that the student learns"
    )
    minilm_weight: float = Field(default=1.0, ge=0, description="weight of the MiniLM loss")
    hidden_weight: float = Field(
        default=0.0, ge=0, description="weight of the hidden states after each block (SquareHead, arXiv:2310.06927)"
    )
    task_weight: float = Field(default=1.0, ge=0, description="weight of the task loss on the labels")
    output_weight: float = Field(default=0.0, ge=0, description="weight of the distillation of the model's outputs")
    output_loss: OutputLossName | None = Field(
        default=None, description="how outputs are compared; default: the first that the task has (GUIDE)"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="of kl, listwise and similarities; default: 1, of similarities 0.05"
    )
    teacher: Teacher | None = Field(
        default=None, description="who teaches, a stage or a source as a bare text; default: the nearest dense ancestor"
    )
    qkv: tuple[str, ...] | None = Field(
        default=None,
        description="names of the q, k, v linears of the last layer (or one fused); default: found by rule",
    )

    @property
    def output_temperature(self) -> float:
        """The temperature of the output distillation."""
        return self.temperature or (0.05 if self.output_loss == "similarities" else 1.0)


class DenseTrainConfig(TrainConfig):
    """Dense fine-tuning."""

    type: Literal["train"] = Field(default="train", description=TYPE_WORDS)
    steps: int | None = Field(
        default=None, ge=0, description="optimizer steps, 0 for the model as it is; give epochs or steps"
    )


class ReconstructionConfig(BaseModel):
    """How each block learns to give the dense block's output, on train rows without their labels."""

    model_config = STRICT

    steps_per_block: int = Field(default=128, ge=1, description="optimizer steps (Adam) of each block")
    learning_rate: float = Field(default=1e-3, gt=0, description="highest rate; a cosine in each block")
    samples: int = Field(default=2048, ge=1, description="train rows, or all where there are fewer; no labels are read")
    batch_size: int = Field(default=16, ge=1, description="rows per device and forward pass")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast, weights stay fp32")

    def training(self) -> TrainConfig:
        """Settings of the training loop."""
        return TrainConfig(
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_schedule="cosine",
            warmup=0.0,
            weight_decay=0.0,
            max_grad_norm=None,
            precision=self.precision,
            evaluate_every=self.steps_per_block,
        )


class PruneConfig(TrainConfig):
    """Progressive N:M pruning with fine-tuning between the masks."""

    type: Literal["prune"] = Field(default="prune", description=TYPE_WORDS)
    pattern: PatternText = Field(default="2:4", description="N:M, keep N of each M")
    patterns: dict[str, PatternOrDense] = Field(
        default={}, description="glob over layer names -> N:M or dense, where it is not pattern; the first glob counts"
    )
    criterion: Annotated[Criterion, OneOf(CRITERIA)] = Field(default=Magnitude(), description="score of a weight")
    schedule: Annotated[Schedule, OneOf(SCHEDULES)] = Field(
        default=PerGroup(), description="how the sparsity grows to its target"
    )
    permute: bool = Field(
        default=False,
        description="first reorder channels so that pruning loses less; the dense model computes the same",
    )
    recovery_fraction: float = Field(
        default=0.8, ge=0, lt=1, description="share of the steps after the last mask; the masks share the rest"
    )
    layers: Layers = Field(default=Layers(), description="layers to prune")
    reconstruct: ReconstructionConfig | None = Field(
        default=None, description="after the last mask, blocks learn the outputs of the dense ancestor's; {}: defaults"
    )
    distill: DistillConfig | None = Field(default=None, description="learn from the dense ancestor; {}: defaults")

    @field_serializer("patterns")
    def keep_order(self, patterns: dict[str, str]) -> list[tuple[str, str]]:
        """Write patterns as pairs, since their order counts in a fingerprint."""
        return [*patterns.items()]


class ReconstructConfig(BaseStage, ReconstructionConfig):
    """Blockwise reconstruction: block after block learns the outputs of the dense ancestor's; masks and scales stay."""

    type: Literal["reconstruct"] = Field(default="reconstruct", description=TYPE_WORDS)


class CalibrateConfig(BaseStage):
    """Post-training calibration of the activation scales."""

    type: Literal["calibrate"] = Field(default="calibrate", description=TYPE_WORDS)
    method: Annotated[Calibrator, OneOf(CALIBRATORS)] = Field(
        default=Percentile(), description="how a histogram of activations becomes a scale"
    )
    placement: PlacementName = Field(
        default="linear",
        description="quantized sites: inputs of linears; tensorrt: also outputs, attention and residual adds; "
        "tensorrt-full: also inputs of activation functions; cpu: the sites of the target cpu-sparse",
    )
    split: Literal["train", "dev"] = Field(default="train", description="split of the calibration rows")
    samples: int = Field(default=512, ge=1, description="number of calibration rows")
    batch_size: int = Field(default=32, ge=1, description="rows per device and forward pass")
    layers: Layers = Field(default=Layers(), description="layers to quantize")


class QatConfig(TrainConfig):
    """Fine-tuning with masks, fake quantization and MiniLM distillation in every step."""

    type: Literal["qat"] = Field(default="qat", description=TYPE_WORDS)
    learning_rate: float = Field(default=2e-5, gt=0, description="highest learning rate")
    activation_scales: Literal["fixed", "learned"] = Field(
        default="fixed", description="learned: LSQ (arXiv:1902.08153)"
    )
    distill: DistillConfig | None = Field(
        default=DistillConfig(), description="learn from the dense ancestor; null: from the labels alone"
    )


class TensorRTConfig(BaseModel):
    """How the target tensorrt is written."""

    model_config = STRICT

    weights: Literal["dq", "qdq"] = Field(
        default="dq",
        description="dq: int8 weights in the file; qdq: float weights with Q and DQ, for TensorRT before 10",
    )
    layers: Literal["matmul", "conv1x1"] = Field(
        default="matmul", description="conv1x1: linears as 1x1 convolutions, which TensorRT 8.x needs for sparsity"
    )
    precision: Literal["fp32", "fp16"] = Field(default="fp32", description="type of what is not int8")


class ExportConfig(BaseStage):
    """Files for inference engines, with their checks."""

    type: Literal["export"] = Field(default="export", description=TYPE_WORDS)
    targets: tuple[TargetName, ...] = Field(default=("onnx-int8",), min_length=1, description="files to write")
    embeddings: Literal["fp32", "fp16", "int8"] = Field(default="fp32", description="type of embedding tables")
    batch_range: Range = Field(default=(1, 8, 32), description="smallest, usual and largest batch of an engine")
    sequence_range: Range | None = Field(
        default=None, description="the same for tokens; default: 16, half of model.max_length, model.max_length"
    )
    tensorrt: TensorRTConfig = Field(default=TensorRTConfig(), description="options of the target tensorrt")
    parity_samples: int = Field(default=256, ge=1, description="dev rows on which the file must agree with the model")
    max_disagreement: float = Field(default=0.005, ge=0, le=1, description="share of decisions that may differ")


def distill_config(config: BaseStage) -> DistillConfig | None:
    """Return how a stage distils; None where it does not."""
    return config.distill if isinstance(config, PruneConfig | QatConfig) else None


def learns_from_labels(config: TrainConfig) -> bool:
    """Whether a stage learns from labels."""
    distill = distill_config(config)
    return distill is None or distill.task_weight > 0


def row_grouping(config: TrainConfig) -> RowGrouping:
    """Which rows of a stage share a batch: those of a query, those of the task's loss, or any."""
    distill = distill_config(config)
    if distill is not None and distill.output_weight and distill.output_loss in LIST_LOSSES:
        return "queries"
    return "labels" if learns_from_labels(config) else "rows"


def reconstructs(config: StageConfig) -> bool:
    """Whether a stage lets blocks learn the outputs of a dense ancestor's."""
    return isinstance(config, ReconstructConfig) or (isinstance(config, PruneConfig) and config.reconstruct is not None)


StageConfig = DenseTrainConfig | PruneConfig | ReconstructConfig | CalibrateConfig | QatConfig | ExportConfig
