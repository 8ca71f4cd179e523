"""Measure how much each layer's treatment changes the output of a model, alone and together with all others.

Sensitivity is a distance between the treated and the untreated model on the same rows: the task's output loss, or how
much a metric decreases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sqat.analyze.findings import Sensitivity, Shares
from sqat.analyze.treatments import Pruning, Quantization, treated_
from sqat.data.batch import Processor
from sqat.data.rows import Rows
from sqat.distillation.outputs import OUTPUT_LOSSES
from sqat.distributed import process_state
from sqat.errors import SqatError, suggest
from sqat.evaluation.inference import EVALUATION_BATCH, logits_of, predict
from sqat.models.layer_selection import weighted_layers
from sqat.progress import Reporter
from sqat.tasks import Task

OUTPUT_LOSS = "output loss"
Measure = Callable[[Tensor], float]


def choose_measure(task: Task, metric: str, plain: Tensor, rows: Rows) -> Measure:
    """Return a function from the treated model's logits [N, ...] to a sensitivity.

    Args:
        metric: one of the task's metrics, or `OUTPUT_LOSS`.
        plain: logits of the untreated model.

    Raises:
        SqatError: no such metric, or one that is not finite for the untreated model.
    """
    if metric == OUTPUT_LOSS:
        distance, no_groups = OUTPUT_LOSSES[task.output_losses[0]], torch.full((len(plain),), -1)
        return lambda treated: clamp_rounding(float(distance(treated, plain, no_groups, 1.0)))
    metrics = task.metrics(plain, rows)
    if metric not in metrics:
        raise SqatError(f"no metric {metric!r}", suggest(metric, metrics), "--metric", code="unknown-name")
    before = metrics[metric]
    if not abs(before) < float("inf"):
        raise SqatError(f"{metric} of the untreated model is {before}: its decrease cannot be measured",
                        "choose more --samples or another metric", "--metric", code="non-finite")  # fmt: skip
    sign = -1.0 if metric.endswith("mse") else 1.0  # the only metrics of which less is better
    return lambda treated: sign * (before - task.metrics(treated, rows)[metric])


def clamp_rounding(loss: float) -> float:
    """A distance, which rounding may make slightly negative; NaN stays."""
    return 0.0 if loss < 0 else loss


@dataclass
class Probe:
    """A model, its treatments, and the rows on which their sensitivity is measured."""

    model: nn.Module
    processor: Processor
    rows: Rows
    pruning: Pruning
    quantization: Quantization
    measure: Measure
    reporter: Reporter
    passes: int = 0

    @property
    def layers(self) -> list[str]:
        """Every layer that gets a treatment, in the model's order."""
        treated = {*self.pruning.masks, *self.quantization.layers}
        return [name for name in weighted_layers(self.model) if name in treated]

    def measure_treated(self, pruned: Collection[str], int8: Collection[str]) -> float:
        """Sensitivity with the named layers pruned and quantized; the model is the same before and after."""
        started = time.monotonic()
        with treated_(self.model, self.pruning, self.quantization, pruned, int8):
            logits = run_model(self.model, self.processor, self.rows)
        self.passes += 1
        self.reporter.advance(self.passes, {}, len(self.rows) / max(time.monotonic() - started, 1e-9))
        return self.measure(logits)

    def sensitivity(self, layers: Sequence[str]) -> Sensitivity:
        """Sensitivity with ``layers`` pruned, quantized, and both."""
        prunable = [name for name in layers if name in self.pruning.masks]
        quantizable = [name for name in layers if name in set(self.quantization.layers)]
        pruned = self.measure_treated(prunable, ()) if prunable else None
        int8 = self.measure_treated((), quantizable) if quantizable else None
        if pruned is not None and int8 is not None:
            return Sensitivity(pruned=pruned, int8=int8, both=self.measure_treated(prunable, quantizable))
        return Sensitivity(pruned=pruned, int8=int8, both=next(value for value in (pruned, int8) if value is not None))

    def measure_sizes(self) -> dict[str, Shares]:
        """Share of each linear and convolution in all weights and multiply-adds, of the first rows with padding."""
        batch = self.processor.collate(self.rows, list(range(min(len(self.rows), EVALUATION_BATCH))))
        layers = weighted_layers(self.model)
        work = dict.fromkeys(layers, 0)

        def count(name: str, module: nn.Module, args: object, output: Tensor) -> None:
            work[name] += output.numel() * layers[name].weight[0].numel()

        hooks = [module.register_forward_hook(partial(count, name)) for name, module in layers.items()]
        try:
            with torch.no_grad():
                self.model.eval()(**batch.to(process_state().device).inputs)
        finally:
            for hook in hooks:
                hook.remove()
        weights = {name: module.weight.numel() for name, module in layers.items()}
        total, total_work = sum(weights.values()), sum(work.values())
        return {name: Shares(weights=weights[name] / total, multiply_adds=work[name] / total_work) for name in layers}


def run_model(model: nn.Module, processor: Processor, rows: Rows) -> Tensor:
    """Logits [N, ...] in eval mode; what a processor draws is the same every time."""
    torch.manual_seed(0)
    return predict(partial(logits_of, model.eval()), rows, processor)
