"""How much the output of a model suffers from each layer's treatment alone, and from all of them together.

The damage is a distance between the treated and the plain model on the same rows: the task's own output loss (KL of
classes, squared difference of scores, 1 - cosine of embeddings), or what a metric loses. Each treatment is one pass
over the rows, which only the logits outlive. Left out: pairs of layers, whose damages do not just add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sqat.analyze.treatments import Pruning, Rounding, treated_
from sqat.data.batch import Batch, Processor
from sqat.data.rows import Rows
from sqat.distributed import process_state
from sqat.errors import SqatError
from sqat.evaluation.inference import logits_of, predict
from sqat.models.layer_selection import weighted_layers
from sqat.progress import Reporter
from sqat.recipe.cross_checks import suggest
from sqat.tasks import Task

OUTPUT_LOSS = "output loss"
Judge = Callable[[Tensor], float]


class Damages(NamedTuple):
    """Damage of the three treatments; None where a layer does not get one."""

    pruned: float | None
    int8: float | None
    both: float


def make_judge(task: Task, metric: str, plain: Tensor, rows: Rows) -> Judge:
    """A function from the treated model's logits [N, ...] to the damage.

    Args:
        metric: one of the task's metrics, or `OUTPUT_LOSS`.
        plain: logits of the model as it is.

    Raises:
        SqatError: no such metric, or one that is not finite for the model as it is.
    """
    if metric == OUTPUT_LOSS:
        return lambda treated: not_below_zero(float(task.output_loss(treated, plain, 1.0)))
    figures = task.metrics(plain, rows)
    if metric not in figures:
        raise SqatError(f"no metric {metric!r}", suggest(metric, figures), "--metric")
    before = figures[metric]
    if not abs(before) < float("inf"):
        raise SqatError(f"{metric} of the model as it is is {before}: nothing can be taken from it",
                        "choose more --samples or another metric", "--metric")  # fmt: skip
    sign = -1.0 if metric.endswith("mse") else 1.0  # the only metrics of which less is better
    return lambda treated: sign * (before - task.metrics(treated, rows)[metric])


def not_below_zero(loss: float) -> float:
    """A distance, which float32's last bits may take below 0; NaN stays."""
    return 0.0 if loss < 0 else loss


@dataclass
class Probe:
    """A model with what may be done to it, and how its output is judged on which rows."""

    model: nn.Module
    processor: Processor
    rows: Rows
    pruning: Pruning
    rounding: Rounding
    judge: Judge
    reporter: Reporter
    passes: int = 0

    @property
    def layers(self) -> list[str]:
        """Every layer that gets a treatment, in the order of the model."""
        treated = {*self.pruning.masks, *self.rounding.layers}
        return [name for name in weighted_layers(self.model) if name in treated]

    def damage(self, pruned: Collection[str], quantized: Collection[str]) -> float:
        """Damage with the named layers pruned and quantized; the model is the same before and after."""
        begun = time.monotonic()
        with treated_(self.model, self.pruning, self.rounding, pruned, quantized):
            logits = run_model(self.model, self.processor, self.rows)
        self.passes += 1
        self.reporter.advance(self.passes, {}, len(self.rows) / max(time.monotonic() - begun, 1e-9))
        return self.judge(logits)

    def damages(self, layers: Sequence[str]) -> Damages:
        """Damage with ``layers`` pruned, quantized, and both."""
        pruned = [name for name in layers if name in self.pruning.masks]
        quantized = [name for name in layers if name in set(self.rounding.layers)]
        alone = self.damage(pruned, ()) if pruned else None, self.damage((), quantized) if quantized else None
        both = self.damage(pruned, quantized) if pruned and quantized else next(x for x in alone if x is not None)
        return Damages(*alone, both)


def run_model(model: nn.Module, processor: Processor, rows: Rows) -> Tensor:
    """Logits [N, ...] in evaluation mode; what a processor draws is drawn alike every time."""
    torch.manual_seed(0)
    return predict(partial(logits_of, model.eval()), rows, processor)


def total(damages: Sequence[Damages]) -> Damages:
    """The sum of single layers' damages, treatment by treatment."""

    def added(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    both = sum(damage.both for damage in damages)
    return Damages(added([damage.pruned for damage in damages]), added([damage.int8 for damage in damages]), both)


def count_multiply_adds(model: nn.Module, batch: Batch) -> dict[str, int]:
    """Multiply-adds of every linear and convolution in one batch."""
    layers = weighted_layers(model)
    counts = dict.fromkeys(layers, 0)

    def count(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        counts[name] += output.numel() * layers[name].weight[0].numel()

    hooks = [module.register_forward_hook(partial(count, name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model.eval()(**batch.to(process_state().device).inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts
