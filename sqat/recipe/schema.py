"""The recipe language: every key a YAML recipe may hold, its type, bounds and default.

This file is the whole schema and nothing else; `sqat.recipe.loader` reads YAML into it and
`sqat.recipe.cross_checks` holds what must be true between stages. The settings of a part (a criterion,
schedule, calibrator or distillation loss) live in the file of the part and come here by the table of their room.
A ValueError raised here starts with the key it is about, so that the error can point at that key's line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import ceil
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic import GetJsonSchemaHandler as JsonHandler
from pydantic_core import CoreSchema, core_schema

from sqat.distillation import LOSSES, RelationLoss
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.quantization.calibrators import CALIBRATORS, Calibrator
from sqat.quantization.calibrators.percentile import Percentile
from sqat.recipe.gates import GATES, GATES_WORDS, STRICT, Gate, Retry
from sqat.recipe.targets import TARGETS
from sqat.sparsity.criteria import CRITERIA, Criterion
from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.schedules import SCHEDULES, Schedule
from sqat.sparsity.schedules.per_group import PerGroup


def tupled(value: Any) -> Any:
    """Turn lists into tuples: strict JSON validation wants them once Python has looked at a value."""
    if isinstance(value, dict):
        return {key: tupled(item) for key, item in value.items()}
    return tuple(tupled(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Short:
    """Let a bare text stand for ``{key: text}``, in recipes and in their JSON schema.

    ``percentile`` is ``{name: percentile}`` and ``train.jsonl`` is ``{path: train.jsonl}``.
    """

    key: str

    def expand(self, value: Any) -> Any:
        return {self.key: value} if isinstance(value, str) else tupled(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: JsonHandler) -> dict[str, Any]:
        full = handler(schema)
        names = list(full.get("discriminator", {}).get("mapping", ()))
        return {"anyOf": [full, {"type": "string", **({"enum": names} if names else {})}], "short": self.key}


@dataclass(frozen=True)
class OneOf:
    """Allow the settings of each part in a table, told apart by ``name``; a bare text is ``{name: text}``."""

    parts: tuple[type, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        union = reduce(or_, self.parts)
        return handler.generate_schema(Annotated[union, Field(discriminator="name"), Short("name")])


def pattern_text(value: str) -> str:
    """Check ``N:M`` by parsing it."""
    parse_pattern(value)
    return value


def pattern_or_dense(value: str) -> str:
    """Check ``N:M`` or ``dense``."""
    if ":" not in value and value != "dense":
        raise ValueError(f"pattern {value!r} is neither N:M, for instance 2:4, nor dense")
    return value if value == "dense" else pattern_text(value)


def ascending(value: tuple[int, int, int]) -> tuple[int, int, int]:
    """Check smallest <= usual <= largest."""
    if not 1 <= value[0] <= value[1] <= value[2]:
        got = ", ".join(map(str, value))
        raise ValueError(f"needs three sizes from 1 on, none smaller than the one before it, got {got}")
    return value


Sha256 = Annotated[
    str, Field(pattern="^[0-9a-f]{64}$", json_schema_extra={"words": "64 lower-case hexadecimal digits"})
]


class ModelConfig(BaseModel):
    """Which model to start from: pretrained weights, or a configuration with random ones."""

    model_config = STRICT

    source: str | None = Field(
        default=None, description="a folder, a hub name, or package:NAME/FOLDER inside an installed package"
    )
    config: dict[str, Any] | None = Field(
        default=None, description="the library's configuration of a model that starts from random weights"
    )
    text_encoder: str | None = Field(
        default=None, description="what reads the captions of text to image; a source like model.source"
    )
    revision: str | None = Field(default=None, description="hub revision; a commit makes the run repeatable")
    sha256: Sha256 | None = Field(default=None, description="digest the weights file must have")
    max_length: int = Field(default=128, ge=4, le=8192, description="tokens a text (or pair) is cut to")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="replaces every dropout rate of the model")

    @model_validator(mode="after")
    def one_start(self) -> ModelConfig:
        if (self.source is None) == (self.config is None):
            raise ValueError("source and config exclude each other: give exactly one of them")
        return self

    @property
    def label(self) -> str:
        """What the model is called in a checkpoint: its source, or the type that its config names."""
        named = self.config or {}
        return self.source or str(named.get("model_type") or named.get("_class_name") or "config")


class SplitConfig(BaseModel):
    """One split: a local file (JSONL, CSV, Parquet, Arrow, optionally .gz) or a split of a hub data set."""

    model_config = STRICT

    path: str | None = Field(
        default=None,
        description="file, relative to the recipe; its ending gives the format; streamed, also a glob of files",
    )
    hub: str | None = Field(default=None, description="data set name on the hub")
    config: str | None = Field(default=None, description="hub configuration name")
    split: str | None = Field(default=None, description="hub split name; default: this split's own name")
    revision: str | None = Field(default=None, description="hub revision")
    limit: int | None = Field(
        default=None, ge=1, description="keep the first N rows (queries, for relevance and retrieval)"
    )
    streaming: bool = Field(
        default=False, description="read train while it is trained on; memory does not grow with its rows"
    )
    buffer: int = Field(default=16384, ge=1, description="rows that are shuffled together where a split is streamed")

    @model_validator(mode="after")
    def one_source(self) -> SplitConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("path and hub exclude each other: give exactly one of them")
        for key in ("config", "split", "revision"):
            if self.path is not None and getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to hub, not to path")
        if "buffer" in self.model_fields_set and not self.streaming:
            raise ValueError("buffer belongs to streaming: true")
        return self


Split = Annotated[SplitConfig, Short("path")]


class Columns(BaseModel):
    """Which column holds what; the defaults are the field names themselves."""

    model_config = STRICT

    text: str = Field(default="text", description="text of classification and regression")
    text_pair: str | None = Field(default=None, description="second text of classification and regression")
    image: str = Field(default="image", description="image: pixels in a .npz, else the path of an image file")
    label: str = Field(default="label", description="class, score or grade; in the row or in each candidate")
    query: str = Field(default="query", description="query of relevance and retrieval")
    passage: str = Field(default="text", description="passage column, in the row or in each candidate")
    group: str | None = Field(default=None, description="query id that ties rows into a group; default: the query text")
    candidates: str | None = Field(default=None, description="list of candidates nested in a row of relevance data")


class Augment(BaseModel):
    """How images are varied while a model trains; evaluation sees them as they are."""

    model_config = STRICT

    shift: int = Field(default=0, ge=0, description="most pixels that an image is moved by, each way")
    flip: bool = Field(default=False, description="mirror half of the images left to right")


class DataConfig(BaseModel):
    """The three splits; dev is measured after every stage, test once at the end."""

    model_config = STRICT

    train: Split = Field(description="rows to learn from; a bare text is its path")
    dev: Split = Field(description="rows measured after every stage")
    test: Split | None = Field(default=None, description="rows measured once, at the end; default: dev serves")
    columns: Columns = Field(default=Columns(), description="names of the columns")
    augment: Augment | None = Field(default=None, description="random changes of training images; default: none")


class ClassificationTask(BaseModel):
    """Classification of one or two texts, or of images."""

    model_config = STRICT

    name: Literal["classification", "image-classification"] = Field(
        default="classification", description="kind of the task"
    )
    labels: tuple[str, ...] | None = Field(
        default=None, description="label names in order; default: sorted, from train"
    )
    metric: Literal["accuracy", "f1"] = Field(default="accuracy", description="dev metric that picks the best step")


class RegressionTask(BaseModel):
    """Text regression, one or two texts."""

    model_config = STRICT

    name: Literal["regression"] = Field(default="regression", description="kind of the task")
    metric: Literal["spearman", "pearson"] = Field(
        default="spearman", description="dev metric that picks the best step"
    )


class QueryPerformanceTask(BaseModel):
    """Prediction of how well a ranker does on a query, from the query and its top passages; labels from 0 to 1."""

    model_config = STRICT

    name: Literal["query-performance"] = Field(default="query-performance", description="kind of the task")
    loss: Literal["mse", "pairwise"] = Field(
        default="mse", description="to the label itself, or over the order of a batch's queries"
    )
    metric: Literal["ndcg", "kendall", "spearman"] = Field(
        default="ndcg", description="dev metric that picks the best step"
    )


class RelevanceTask(BaseModel):
    """Ranking of passages for a query by a cross-encoder; labels are grades, 0 = not relevant."""

    model_config = STRICT

    name: Literal["relevance"] = Field(default="relevance", description="kind of the task")
    loss: Literal["pointwise", "pairwise"] = Field(
        default="pairwise", description="over single pairs or a query's passages"
    )
    relevant_from: float = Field(default=1.0, gt=0, description="lowest grade that counts as relevant")
    candidates: int | None = Field(default=None, ge=2, description="candidates of a query used per training epoch")
    highest: float | None = Field(
        default=None, gt=0, le=100, description="highest grade there can be; default: the highest of train"
    )
    metric: Literal["ndcg@10", "pnr", "mrr", "accuracy", "auc", "pair-accuracy"] = Field(
        default="ndcg@10", description="dev metric that picks the best step"
    )

    @model_validator(mode="after")
    def meaningful(self) -> RelevanceTask:
        if self.metric == "pair-accuracy" and self.loss == "pairwise":
            raise ValueError("metric pair-accuracy needs loss pointwise: a pairwise loss fixes no zero of the logit")
        if self.highest is not None and self.relevant_from > self.highest:
            raise ValueError("relevant_from is above highest, so nothing could be relevant")
        return self


class RetrievalTask(BaseModel):
    """Search by a bi-encoder: queries and passages become vectors; labels are grades, 0 = not relevant."""

    model_config = STRICT

    name: Literal["retrieval"] = Field(default="retrieval", description="kind of the task")
    relevant_from: float = Field(default=1.0, gt=0, description="lowest grade that makes a passage a positive")
    negatives: int = Field(default=1, ge=0, description="hard negatives a query brings into its batch, anew each epoch")
    temperature: float = Field(default=0.05, gt=0, le=10, description="what cosines are divided by in the loss")
    pooling: Literal["mean", "cls", "max"] | None = Field(
        default=None, description="how tokens become one vector; default: as the source has it, else mean"
    )
    metric: Literal["ndcg@10", "recall@1", "recall@10", "mrr@10", "rerank-ndcg@10", "pnr"] = Field(
        default="ndcg@10", description="dev metric that picks the best step"
    )


class TextToImageTask(BaseModel):
    """Drawing pictures from captions by rectified flow; data.columns.text is the caption."""

    model_config = STRICT

    name: Literal["text-to-image"] = Field(default="text-to-image", description="kind of the task")
    metric: Literal["explained"] = Field(default="explained", description="dev metric that picks the best step")


Task = Annotated[
    ClassificationTask | RegressionTask | QueryPerformanceTask | RelevanceTask | RetrievalTask | TextToImageTask,
    Field(discriminator="name"),
    Short("name"),
]


class FitConfig(BaseModel):
    """The training loop's knobs, shared by every stage that trains."""

    model_config = STRICT

    parent: str | None = Field(
        default=None,
        alias="from",
        description="stage to start from; default: the nearest one before that is no export",
    )
    epochs: float | None = Field(default=None, gt=0, description="passes over train (default 1); give epochs or steps")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; give epochs or steps")
    batch_size: int = Field(default=32, ge=1, description="rows per device and forward pass")
    gradient_accumulation: int = Field(default=1, ge=1, description="batches summed up to one optimizer step")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="how gradients become steps")
    learning_rate: float = Field(default=5e-5, gt=0, description="highest learning rate")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="its fall after the warm-up"
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(default=0.01, ge=0, description="decay of all weights but biases and norms")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are clipped to it; null: not at all")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast, weights stay fp32")
    evaluate_every: int | None = Field(
        default=None, ge=1, description="steps between dev evaluations; default: at the end"
    )
    early_stopping: int | None = Field(default=None, ge=1, description="evaluations without gain before stopping")
    keep_checkpoint: Literal["last", "best"] = Field(
        default="last", description="which step's weights the stage returns"
    )
    save_every: float = Field(
        default=60.0, ge=0, description="seconds between mid-stage states to resume from; 0: after every step"
    )
    gates: dict[str, Gate] = Field(default=GATES, description=GATES_WORDS)
    retry: Retry | None = Field(default=None, description="how often to try again where a gate is missed; default: not")

    @model_validator(mode="after")
    def consistent(self) -> FitConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("steps and epochs exclude each other: give one of them (null for the other)")
        if self.early_stopping is not None and self.evaluate_every is None:
            raise ValueError("early_stopping needs evaluate_every, the steps between two evaluations")
        if self.retry is not None and not self.gates:
            raise ValueError("retry needs gates, which say when to try again")
        return self

    def total_steps(self, batches: int, together: int) -> int:
        """Optimizer steps of a fit over an epoch of ``batches`` batches, of which a step sums up ``together``."""
        if self.steps is not None:
            return self.steps
        return max(1, ceil((self.epochs or 1.0) * batches / together))

    def stretch(self, attempt: int) -> float:
        """Factor on the steps of the ``attempt``-th try."""
        return 1.0 if self.retry is None else self.retry.steps_multiplier ** (attempt - 1)

    def stretched(self, attempt: int) -> FitConfig:
        """The configuration of the ``attempt``-th try, with the steps that ``retry`` gives it."""
        factor = self.stretch(attempt)
        if factor == 1:
            return self
        if self.steps is not None:
            return self.model_copy(update={"steps": round(self.steps * factor)})
        return self.model_copy(update={"epochs": (self.epochs or 1.0) * factor})


class Layers(BaseModel):
    """Which linear layers and convolutions a stage treats, by glob over module names."""

    model_config = STRICT

    include: tuple[str, ...] | None = Field(
        default=None, description="default: every encoder linear that rule B8 allows"
    )
    exclude: tuple[str, ...] = Field(default=(), description="taken out of what include chose")


class DistillConfig(BaseModel):
    """MiniLM distillation from the dense ancestor, with optional logit distillation and task loss."""

    model_config = STRICT

    loss: Annotated[RelationLoss, OneOf(LOSSES)] = Field(
        default=MiniLMv2(), description="relations of q, k and v that the student learns"
    )
    minilm_weight: float = Field(default=1.0, ge=0, description="weight of the MiniLM loss")
    task_weight: float = Field(default=1.0, ge=0, description="weight of the task loss on the labels")
    output_weight: float = Field(default=0.0, ge=0, description="weight of the distillation of the logits")
    temperature: float = Field(default=1.0, gt=0, description="temperature of the logit distillation")
    teacher: str | None = Field(default=None, description="stage that teaches; default: the nearest dense ancestor")
    qkv: tuple[str, ...] | None = Field(
        default=None,
        description="names of the q, k, v linears of the last layer (or one fused); default: found by rule",
    )


class TrainConfig(FitConfig):
    """Dense fine-tuning."""

    type: Literal["train"] = Field(default="train", description="type of the stage; default: its name")
    steps: int | None = Field(
        default=None, ge=0, description="optimizer steps, 0 for the model as it is; give epochs or steps"
    )


class PruneConfig(FitConfig):
    """Progressive N:M pruning with fine-tuning between the steps."""

    type: Literal["prune"] = Field(default="prune", description="type of the stage; default: its name")
    pattern: Annotated[str, AfterValidator(pattern_text)] = Field(default="2:4", description="N:M, keep N of each M")
    patterns: dict[str, Annotated[str, AfterValidator(pattern_or_dense)]] = Field(
        default={}, description="glob over layer names -> N:M or dense, where it is not pattern; the first glob counts"
    )
    criterion: Annotated[Criterion, OneOf(CRITERIA)] = Field(default=Magnitude(), description="which weights matter")
    schedule: Annotated[Schedule, OneOf(SCHEDULES)] = Field(
        default=PerGroup(), description="how the sparsity grows to its target"
    )
    permute: bool = Field(
        default=False,
        description="first put channels within blocks in an order that loses less; the dense model computes the same",
    )
    recovery_fraction: float = Field(
        default=0.8,
        ge=0,
        lt=1,
        description="share of the steps after the last mask; the rest is split between the steps",
    )
    layers: Layers = Field(default=Layers(), description="which linears are pruned")
    distill: DistillConfig | None = Field(
        default=None, description="learn from the dense ancestor; {} for the defaults"
    )

    @model_serializer(mode="wrap")
    def with_ordered_patterns(self, section: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Patterns as pairs, since their order counts; what is not asked for is no key: older checkpoints stay."""
        entries: dict[str, Any] = section(self)
        entries.pop("patterns", None)  # not there where defaults are left out
        if not self.permute:
            entries.pop("permute", None)
        return entries | ({"patterns": [*self.patterns.items()]} if self.patterns else {})


Placement = Literal["linear", "tensorrt", "tensorrt-full", "cpu"]
FLOAT_OUTPUTS: tuple[Placement, ...] = ("linear", "cpu")  # without scales of what linears put out


class CalibrateConfig(BaseModel):
    """Post-training calibration of the activation scales."""

    model_config = STRICT

    type: Literal["calibrate"] = Field(default="calibrate", description="type of the stage; default: its name")
    parent: str | None = Field(
        default=None,
        alias="from",
        description="stage to start from; default: the nearest one before that is no export",
    )
    method: Annotated[Calibrator, OneOf(CALIBRATORS)] = Field(
        default=Percentile(), description="how a histogram of activations becomes a scale"
    )
    placement: Placement = Field(
        default="linear",
        description="which sites are quantized: inputs of linears; tensorrt: outputs, attention and residual adds "
        "too; tensorrt-full: also what an activation function reads; cpu: what the target cpu-sparse serves",
    )
    split: Literal["train", "dev"] = Field(default="train", description="which rows are observed")
    samples: int = Field(default=512, ge=1, description="rows to observe")
    batch_size: int = Field(default=32, ge=1, description="rows per device and forward pass")
    layers: Layers = Field(default=Layers(), description="which linears are quantized")
    gates: dict[str, Gate] = Field(default=GATES, description=GATES_WORDS)


class QatConfig(FitConfig):
    """Fine-tuning with masks, fake quantization and MiniLM distillation in every step."""

    type: Literal["qat"] = Field(default="qat", description="type of the stage; default: its name")
    learning_rate: float = Field(default=2e-5, gt=0, description="highest learning rate")
    activation_scales: Literal["fixed", "learned"] = Field(
        default="fixed", description="learned: LSQ (arXiv:1902.08153)"
    )
    distill: DistillConfig | None = Field(
        default=DistillConfig(), description="learn from the dense ancestor; null: from the labels alone"
    )


Range = Annotated[tuple[int, int, int], AfterValidator(ascending)]
if TYPE_CHECKING:
    TargetName = str
else:
    TargetName = Literal[tuple(TARGETS)]


class TensorRTConfig(BaseModel):
    """How the file of the target tensorrt is written."""

    model_config = STRICT

    weights: Literal["dq", "qdq"] = Field(
        default="dq", description="dq: stored as int8 (TensorRT 10 and later); qdq: as float with Q and DQ (8.x)"
    )
    layers: Literal["matmul", "conv1x1"] = Field(
        default="matmul", description="conv1x1: linears as 1x1 convolutions, which TensorRT 8.x needs for sparsity"
    )
    precision: Literal["fp32", "fp16"] = Field(default="fp32", description="type of what is not int8")


class ExportConfig(BaseModel):
    """Files for the engines, with their checks."""

    model_config = STRICT

    type: Literal["export"] = Field(default="export", description="type of the stage; default: its name")
    parent: str | None = Field(
        default=None,
        alias="from",
        description="stage to start from; default: the nearest one before that is no export",
    )
    targets: tuple[TargetName, ...] = Field(default=("onnx-int8",), min_length=1, description="what to write")
    embeddings: Literal["fp32", "fp16", "int8"] = Field(
        default="fp32", description="how ONNX files store the embedding tables"
    )
    batch_range: Range = Field(
        default=(1, 8, 32), description="smallest, usual and largest batch an engine is built for"
    )
    sequence_range: Range | None = Field(
        default=None, description="the same for tokens; default: 16, half of model.max_length, model.max_length"
    )
    tensorrt: TensorRTConfig = Field(default=TensorRTConfig(), description="options of the target tensorrt")
    parity_samples: int = Field(default=256, ge=1, description="dev rows on which the file must agree with the model")
    max_disagreement: float = Field(default=0.005, ge=0, le=1, description="share of decisions allowed to differ")
    gates: dict[str, Gate] = Field(default=GATES, description=GATES_WORDS)


StageName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9-]*$",
        json_schema_extra={"words": "lower-case letters, digits and -, a letter or digit first"},
    ),
]
StageConfig = TrainConfig | PruneConfig | CalibrateConfig | QatConfig | ExportConfig
AnyStage = Annotated[StageConfig, Field(discriminator="type")]
STAGE_TYPES = ("train", "prune", "calibrate", "qat", "export")


def named_stages(value: Any) -> Any:
    """Fill in ``type`` where a stage's name is its type, so that ``prune: {}`` is enough."""
    if not isinstance(value, dict):
        return value
    filled = {}
    for name, config in value.items():
        config = {} if config is None else config
        if isinstance(config, dict) and "type" not in config and name in STAGE_TYPES:
            config = {"type": name, **config}
        filled[name] = tupled(config)
    return filled


class Recipe(BaseModel):
    """One recipe: model, task, data and the tree of stages."""

    model_config = STRICT

    name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="run folder; default: the file's name",
        json_schema_extra={"words": "letters, digits and . _ -"},
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of everything random: order, dropout, new weights")
    output: str = Field(default="runs", description="folder of the runs, relative to the working directory")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(),
        description="where losses and metrics go on the way; TensorBoard's files: tracking, in the run folder",
    )
    model: ModelConfig = Field(description="what to start from")
    task: Task = Field(description="what the model learns; a bare text is its name")
    data: DataConfig = Field(description="files and columns")
    stages: Annotated[dict[StageName, AnyStage], BeforeValidator(named_stages)] = Field(
        min_length=1,
        description="name -> stage, in order of execution; a stage named by its type needs no key 'type'",
    )
    results: dict[str, str] = Field(
        default={},
        description="rows of the closing table: label -> stage or stage/target; default: every last stage",
    )

    def parent_of(self, name: str) -> str | None:
        """Name of the stage that ``name`` starts from; None for the pretrained model."""
        explicit = self.stages[name].parent
        if explicit is not None:
            return explicit
        names = list(self.stages)
        before = names[: names.index(name)]
        return next((other for other in reversed(before) if self.stages[other].type != "export"), None)


class LoadedRecipe(BaseModel):
    """A recipe with what its file was: the text is kept verbatim in every checkpoint."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...] = ()

    @property
    def run_directory(self) -> Path:
        return Path(self.recipe.output) / self.recipe.name
