"""Parity: does an exported file compute what the torch model computes, within the noise floor of rounding?

The noise floor is how far the torch model's logits move when every operation is off by one rounding error. A
fake-quantized network turns such an error into whole quantization steps wherever a value lies near a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqat.data.batch import Batch, Processor
from sqat.data.rows import Rows, column
from sqat.errors import GateError, SqatError
from sqat.evaluation.evaluate import served_model
from sqat.evaluation.inference import logits_of, predict
from sqat.export.source import TargetFile
from sqat.modules.hooks import is_activation
from sqat.quantization.fake_quant import FP32_NOISE
from sqat.recipe.stages import ExportConfig
from sqat.runtime.sessions import parity
from sqat.tasks import Task
from sqat.tasks.task import tie_margin
from sqat.training.resume import Metrics

NOISE_FACTOR = 3  # a file may differ by this many noise floors
NUM_PERTURBATIONS = 8


@dataclass(frozen=True)
class Parity:
    """How far a file is from the torch model.

    Attributes:
        decisions: number of compared decisions: dev rows, or queries.
        difference: largest absolute difference of a logit.
        noise_floor: the same between the torch model and its perturbations.
        agreement: share of equal decisions, as the task defines them.
        explained: number of other decisions that a perturbation of the torch model changes too.
        disagreement: share of decisions that differ and that rounding does not explain.
    """

    decisions: int
    difference: float
    noise_floor: float
    agreement: float
    explained: int
    disagreement: float

    def __str__(self) -> str:
        explained = f" ({self.explained} more differ within the noise floor)" if self.explained else ""
        return (
            f"{self.agreement:.2%} of {self.decisions} decisions equal{explained}, largest logit difference "
            f"{self.difference:.1e} (noise floor {self.noise_floor:.1e})"
        )


def prove_parity(
    name: str, forward: Callable[[Batch], Tensor], file: TargetFile, dev: Rows, config: ExportConfig, task: Task
) -> tuple[Parity, Metrics]:
    """Run an exported file on dev rows, compare it with its torch model, and measure it.

    Args:
        name: of the file, for messages.
        forward: logits of a batch by the file.

    Raises:
        GateError: a logit differs by more than the noise floor explains, or more decisions than the recipe allows.
    """
    with served_model(file.reference) as (model, processor):
        rows = select_whole_groups(dev, config.parity_samples)
        expected = predict(partial(logits_of, model), rows, processor)
        logits = predict(forward, dev, processor)
        compared = logits[: len(rows)]
        equal = task.same_decision(expected, compared, rows)
        if not len(equal):
            raise SqatError(f"the first {len(rows)} dev rows hold nothing to decide on", "raise parity_samples",
                            code="no-rows")  # fmt: skip
        difference = parity(expected.numpy(), compared.numpy())
        needed_noise = (difference - tie_margin(expected) / 100) / NOISE_FACTOR
        noise_floor, explained = 0.0, equal
        for perturbed in perturbed_logits(model, rows, processor, file.rounding):
            noise_floor = max(noise_floor, parity(expected.numpy(), perturbed.numpy()))
            explained = explained | ~task.same_decision(expected, perturbed, rows)
            if noise_floor >= needed_noise and share(~explained) <= config.max_disagreement:
                break
    result = Parity(len(equal), difference, noise_floor, share(equal), int((explained & ~equal).sum()),
                    share(~explained))  # fmt: skip
    if noise_floor < needed_noise:
        raise difference_error(name, difference, noise_floor)
    if result.disagreement > config.max_disagreement:
        raise GateError(
            f"{name} decides differently from the torch model in {result.disagreement:.2%} of {result.decisions} "
            f"decisions, allowed {config.max_disagreement:.2%} (largest logit difference {difference:.2e})",
            "nothing was written",
            code="parity",
        )
    return result, task.metrics(logits, dev)


def check_resemblance(name: str, forward: Callable[[Batch], Tensor], file: TargetFile, rows: Rows) -> None:
    """Compare an exported file with its torch model on a few rows, as a rehearsal does.

    Where a value falls to the other side of a tie, one row in a few is far off, and no perturbation shows it. So most
    rows must be off by more than rounding explains; a fault of the file concerns most rows.

    Raises:
        GateError: they are.
    """
    with served_model(file.reference) as (model, processor):
        expected = predict(partial(logits_of, model), rows, processor)
        differences = (predict(forward, rows, processor) - expected).abs().flatten(1).amax(dim=1)
        difference = float(differences.nan_to_num(nan=torch.inf).median())
        needed_noise, noise_floor = (difference - tie_margin(expected) / 100) / NOISE_FACTOR, 0.0
        for perturbed in perturbed_logits(model, rows, processor, file.rounding):
            noise_floor = max(noise_floor, parity(expected.numpy(), perturbed.numpy()))
            if noise_floor >= needed_noise:
                return
    raise difference_error(name, difference, noise_floor)


def difference_error(name: str, difference: float, noise_floor: float) -> GateError:
    """Make the error of a file that computes something else than its model."""
    noise = f"(noise floor {noise_floor:.2e})"
    problem = f"{name} is off by {difference:.2e} in a logit, more than rounding explains {noise}"
    return GateError(problem, "nothing was written", code="parity")


def perturbed_logits(model: nn.Module, rows: Rows, processor: Processor, size: float) -> Iterator[Tensor]:
    """Yield the torch model's logits under several perturbations: a tie falls the other way under some only."""
    for seed in range(NUM_PERTURBATIONS):
        with perturb_outputs(model, size, seed):
            yield predict(partial(logits_of, model), rows, processor)


@contextmanager
def perturb_outputs(model: nn.Module, size: float = FP32_NOISE, seed: int = 0) -> Iterator[None]:
    """Multiply what every layer, norm and activation function puts out by 1 + noise of relative ``size``."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return output * (1 + size * noise)

    modules = [module for module in model.modules() if rounds_sums(module)]
    handles = [module.register_forward_hook(perturb, prepend=True) for module in modules]  # before its quantizer
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounds_sums(module: nn.Module) -> bool:
    """Whether a module computes sums that each runtime rounds in its own way."""
    return isinstance(module, nn.Linear | nn.Conv2d) or "Norm" in type(module).__name__ or is_activation(module)


def share(flags: Tensor) -> float:
    """Share of true flags."""
    return flags.float().mean().item()


def select_whole_groups(rows: Rows, count: int) -> Rows:
    """Select the first ``count`` rows and the rest of the last query's group."""
    count = min(count, len(rows))
    if "group" in rows.column_names:
        groups = column(rows, "group")
        while count < len(rows) and groups[count] == groups[count - 1]:
            count += 1
    return rows.select(range(count))
