"""NVIDIA Model Optimizer's chains, by its own functions (tested with the version in the JSON file).

Layers are those that sqat treats: pooler and head stay dense and float, and its int8 preset's quantizers of the inputs
of layer norms are off, which can only help. Its SparseGPT chooses masks and leaves the weights that stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import modelopt.torch.distill as mtd
import modelopt.torch.quantization as mtq
import modelopt.torch.sparsity as mts
from torch import Tensor, nn

from scripts.benchmarks.beside_modelopt.chain import Made, Phases
from scripts.benchmarks.beside_modelopt.sets import Trial
from sqat.data.batch import Batch
from sqat.models.layer_selection import choose_layers
from sqat.recipe.stages import Layers

CALIBRATIONS = {"max": mtq.INT8_DEFAULT_CFG, "smoothquant": mtq.INT8_SMOOTHQUANT_CFG}
HEAD = "classifier"


def sparse(mode: str, trial: Trial, teacher: nn.Module, learning_rate: float) -> Phases:
    """Sparsify and train with the masks; then ways to quantize what came of it."""
    observe = partial(run, batches=trial.observed())
    layers = list(choose_layers(teacher, Layers(), "prune", 4).chosen)
    rules: dict[str, Any] = {"*": None, **{name: {} for name in layers}}
    model = mts.sparsify(
        copy.deepcopy(teacher).eval(), [(mode, {"nn.Linear": rules})], {"forward_loop": observe, "verbose": False}
    )
    model = distil(trial, model, teacher, trial.budget.sparse_steps, learning_rate)

    @contextmanager
    def quantized(name: str) -> Iterator[nn.Module]:
        yield mtq.quantize(copy.deepcopy(model), only(layers, CALIBRATIONS[name]), observe)

    @contextmanager
    def qat(name: str, rate: float) -> Iterator[Made]:
        with quantized(name) as student:
            done = distil(trial, student, teacher, trial.budget.qat_steps, rate)
            yield Made(done, [effective(done.get_submodule(layer)) for layer in layers])

    return Phases(tuple(CALIBRATIONS), quantized, qat)


def run(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Show a model the rows that are observed."""
    for inputs in batches:
        model(**inputs)


def only(layers: list[str], preset: dict[str, Any]) -> dict[str, Any]:
    """A preset of int8 for these layers alone."""
    rules = copy.deepcopy(preset)
    kept = [
        rule for rule in rules["quant_cfg"] if rule.get("quantizer_name") in ("*weight_quantizer", "*input_quantizer")
    ]
    named = [{**rule, "quantizer_name": f"{layer}.{rule['quantizer_name'][1:]}"} for layer in layers for rule in kept]
    return {**rules, "quant_cfg": [{"quantizer_name": "*", "enable": False}, *named]}


def distil(trial: Trial, model: nn.Module, teacher: nn.Module, steps: int, learning_rate: float) -> nn.Module:
    """Train by its distillation of logits; squared error where there is one logit, of which a softmax says nothing."""
    loss = mtd.LogitsDistillationLoss(reduction="batchmean") if trial.task.outputs > 1 else nn.MSELoss()
    config = {"teacher_model": copy.deepcopy(teacher), "criterion": {(HEAD, HEAD): loss}}
    student = mtd.convert(model, [("kd_loss", config)])
    trial.train(student, kd_loss, steps, learning_rate)
    exported: nn.Module = mtd.export(student)
    return exported.eval()


def kd_loss(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The loss that its wrapped model computes."""
    model(**batch.inputs)
    return {"logits": model.compute_kd_loss()}


def effective(module: Any) -> Tensor:
    """The weight that is multiplied: masked, and quantized as its forward pass does."""
    weight: Tensor = module.weight_quantizer(module.weight)
    return weight.detach()
