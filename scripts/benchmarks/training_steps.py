"""Candidates of the training benchmark: training steps, calibration and masks, each as its stage makes it.

Each step has its own model with the same weights and calls `sqat.training.step.take_step` on one batch. The quantizers
of Model Optimizer and torch have no masks: compare them to `QAT step, dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scripts.benchmarks.training_rows import MODEL_OPTIMIZER, Group
from sqat.api.quantize import Scales, calibrate
from sqat.compress.calibrate import observe
from sqat.compress.training_losses import distilled_loss, task_loss
from sqat.data.batch import Batch
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.models.loading import load_pretrained
from sqat.modules.activation_quantizers import Quantizers, insert_quantizers_
from sqat.modules.parametrize import get_layer, insert_weights_
from sqat.modules.site_discovery import discover_sites
from sqat.quantization.fake_quant import ACTIVATION_LOW, HIGH, SMALLEST_AMAX
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.inputs import ModelConfig
from sqat.recipe.stages import DistillConfig, Layers, QatConfig, TrainConfig
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import Pattern
from sqat.tasks.relevance import Relevance
from sqat.training.batches import MicroBatch
from sqat.training.data_parallel import Loss, Objective, ParallelModel
from sqat.training.optimizer import make_optimizer
from sqat.training.step import take_step

TASK = Relevance()
CANDIDATES = 4  # passages of a query
TWO_OF_FOUR = Pattern(2, 4)
BERT_BASE = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # of one block of twelve
PASSES = 4  # batches of a calibration turn
RATE = 1e-5


def load_model(source: str) -> nn.Module:
    """The model as a recipe with this source begins with it."""
    config = ModelConfig(source=source, max_length=64)
    head = {"num_labels": TASK.outputs, **TASK.config_fields}
    return load_pretrained(TASK.architecture, config, Path(), head, 0)[0]


def random_batch(model: nn.Module, shape: tuple[int, int]) -> Batch:
    """Queries of four passages each, of which the first is relevant; random tokens, nothing padded."""
    texts = shape[0]
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    groups = torch.arange(texts // CANDIDATES).repeat_interleave(CANDIDATES)
    return Batch(inputs, (torch.arange(texts) % CANDIDATES == 0).float(), groups)


class Step:
    """Takes one optimizer step a call."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch, hooks: ExitStack | None = None) -> None:
        self.hooks = hooks  # of the loss, for as long as the step lives
        self.config = TrainConfig()
        self.optimizer = make_optimizer(model.train(), self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE
        objective = Objective(model, loss)
        self.parallel, self.number = ParallelModel(objective, objective, Accelerator(cpu=True), None), 0
        self.batch = batch

    def __call__(self) -> None:
        self.number += 1
        micro_batches = [MicroBatch(self.batch, 1.0, (0, self.number, 1))]
        take_step(self.parallel, self.optimizer, micro_batches, self.config, self.number)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """2:4 masks of what a prune stage prunes."""
    chosen = choose_layers(model, Layers(), "prune").chosen
    return {name: nm_mask(get_layer(model, name).weight.detach().abs(), TWO_OF_FOUR) for name in chosen}


def quantize_(model: nn.Module, scales: Scales, masks: dict[str, Tensor]) -> nn.Module:
    """Put in what a QAT stage puts in."""
    insert_quantizers_(model, Quantizers(scales.amax, scales.shared_with), encoder_blocks(model))
    insert_weights_(model, masks, scales.layers)
    return model


def step_group(source: str, shape: tuple[int, int]) -> Group:
    """Dense, prune and QAT steps."""
    model = load_model(source)
    batch, loss = random_batch(model, shape), task_loss(TASK)
    masks, scales = masks_of(model), calibrate(model, [batch.inputs])
    pruned = load_model(source)
    insert_weights_(pruned, masks, ())
    calls: dict[str, Callable[[], object]] = {
        "dense step": Step(model, loss, batch),
        "prune step": Step(pruned, loss, batch),
        "QAT step": Step(quantize_(load_model(source), scales, masks), loss, batch),
        "QAT step with MiniLM v2": distilled_step(
            quantize_(load_model(source), scales, masks), load_model(source), batch
        ),
        "QAT step, dense": Step(quantize_(load_model(source), scales, {}), loss, batch),
        "QAT step, dense, torch's fused quantizers": fuse(Step(quantize_(load_model(source), scales, {}), loss, batch)),
    }
    if find_spec(MODEL_OPTIMIZER):
        calls["QAT step, dense, Model Optimizer"] = Step(insert_modelopt(load_model(source), batch), loss, batch)
    goals = {"prune step": "1.02", "QAT step": "1.05, and below Model Optimizer", "QAT step with MiniLM v2": "1.42"}
    return Group(calls, goals)


def distilled_step(student: nn.Module, teacher: nn.Module, batch: Batch) -> Step:
    """A step with the loss of a QAT stage with the default distillation."""
    teacher.eval().requires_grad_(False)
    config = QatConfig().distill or DistillConfig()
    hooks = ExitStack()
    return Step(student, hooks.enter_context(distilled_loss(student, teacher, config, TASK)), batch, hooks)


def insert_modelopt(model: nn.Module, batch: Batch) -> nn.Module:
    """The model with Model Optimizer's int8 quantizers, calibrated on the batch."""
    import modelopt.torch.quantization as mtq

    result: nn.Module = mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, lambda model: model(**batch.inputs))
    return result


def fuse(step: Step) -> Callable[[], None]:
    """The step with torch's fused fake quantizers in the place of ours."""

    def call() -> None:
        with fused_quantizers():
            step()

    return call


@contextmanager
def fused_quantizers() -> Iterator[None]:
    """Let the inserted quantizers call torch's operators."""
    with (
        patch("sqat.modules.activation_quantizers.fake_quantize", fused_activation),
        patch("sqat.modules.parametrize.fake_quantize_weight", fused_weight),
    ):
        yield


def fused_activation(x: Tensor, amax: Tensor, low: int = ACTIVATION_LOW) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, float(amax) / HIGH, 0, low, HIGH)


def fused_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    scale = weight.detach().abs().amax(1).clamp(min=SMALLEST_AMAX) / HIGH
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -HIGH, HIGH)


def calibration_group(source: str, shape: tuple[int, int]) -> Group:
    """A plain forward pass, and one that a calibrate stage observes."""
    model = load_model(source).eval()
    batches = [random_batch(model, shape).inputs] * PASSES
    blocks = encoder_blocks(model)
    sites = discover_sites(
        model, batches[0], choose_layers(model, Layers(), "quantize").chosen, blocks, PLACEMENTS["linear"]
    )

    def forward() -> None:
        with torch.no_grad():
            for inputs in batches:
                model(**inputs)

    calls = {f"forward pass of {PASSES} batches": forward,
             f"calibration of {PASSES} batches": lambda: observe(model, sites, blocks, batches)}  # fmt: skip
    return Group(calls, {f"calibration of {PASSES} batches": "1.25"})


def mask_group(shapes: Sequence[tuple[int, int]] = BERT_BASE * 12) -> Group:
    """2:4 masks of weights of these shapes: through torch's topk, and ours."""
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    size = f"{sum(weight.numel() for weight in weights) / 1e6:.0f} M weights"
    calls = {f"2:4 masks of {size} by topk": lambda: [mask_by_topk(weight) for weight in weights],
             f"2:4 masks of {size}": lambda: [nm_mask(weight.abs(), TWO_OF_FOUR) for weight in weights]}  # fmt: skip
    return Group(calls, {f"2:4 masks of {size}": "300 ms"})


def mask_by_topk(weight: Tensor) -> Tensor:
    groups = weight.abs().view(-1, TWO_OF_FOUR.m)
    kept = groups.topk(TWO_OF_FOUR.n, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).view(weight.shape)


def groups_of(names: Sequence[str], source: str, shape: tuple[int, int]) -> Iterator[Group]:
    """The groups of these names, each made when it is its turn; one thread from now on."""
    torch.set_num_threads(1)
    if "steps" in names:
        yield step_group(source, shape)
    if "calibration" in names:
        yield calibration_group(source, shape)
    if "masks" in names:
        yield mask_group()
