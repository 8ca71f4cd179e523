"""sqat's chain, of the parts that its stages are made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

import sqat
from scripts.benchmarks.beside_modelopt.chain import Made, Phases
from scripts.benchmarks.beside_modelopt.sets import Trial
from sqat.compress.training_losses import distilled_loss
from sqat.modules.parametrize import get_layer
from sqat.quantization.calibrators.maximum import Maximum
from sqat.quantization.calibrators.percentile import Percentile
from sqat.recipe.stages import DistillConfig
from sqat.sparsity.criteria.sparsegpt import SparseGPT
from sqat.training.data_parallel import Loss

CALIBRATIONS = {"max": Maximum(), "percentile-99.999": Percentile(percentile=99.999)}


def sparse(trial: Trial, teacher: nn.Module, learning_rate: float) -> Phases:
    """Prune by SparseGPT and train with the masks; then ways to quantize what came of it."""
    model, batches = copy.deepcopy(teacher), trial.observed()
    masks = sqat.prune(model, "2:4", SparseGPT(), batches=batches)
    with sqat.masked(model, masks), loss_of(trial, model, teacher) as loss:
        trial.train(model, loss, trial.budget.sparse_steps, learning_rate)
    scales = {name: sqat.calibrate(model, batches, method, "linear") for name, method in CALIBRATIONS.items()}

    @contextmanager
    def quantized(name: str) -> Iterator[nn.Module]:
        student = copy.deepcopy(model)
        with sqat.quantized(student, masks, scales[name]):
            yield student

    @contextmanager
    def qat(name: str, rate: float) -> Iterator[Made]:
        with quantized(name) as student:
            with loss_of(trial, student, teacher) as loss:
                trial.train(student, loss, trial.budget.qat_steps, rate)
            yield Made(student, [effective(student, layer_name) for layer_name in masks.kept])

    return Phases(tuple(CALIBRATIONS), quantized, qat)


def effective(model: nn.Module, name: str) -> Tensor:
    """The weight that is multiplied."""
    weight = get_layer(model, name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def loss_of(trial: Trial, model: nn.Module, teacher: nn.Module) -> AbstractContextManager[Loss]:
    """MiniLM relations and logits of the teacher, as stages with ``distill`` have them."""
    return distilled_loss(model, teacher, DistillConfig(output_weight=1.0, task_weight=0.0), trial.task)
