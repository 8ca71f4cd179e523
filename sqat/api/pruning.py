"""N:M pruning in a loop of one's own: at once, or step by step while the model trains."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from sqat.api.choices import Inputs, check_masks, check_plain, choose_part, model_inputs
from sqat.compress.eval_mode import eval_mode
from sqat.compress.masking import Masking, mask_of
from sqat.compress.permuting import permute_
from sqat.compress.statistics import sum_up
from sqat.data.dataset import Batch
from sqat.errors import SqatError
from sqat.models.layer_selection import choose_layers
from sqat.modules.parametrize import WeightTransform, insert_weights_, layer, remove_weights_
from sqat.recipe.stages import Layers
from sqat.sparsity.criteria import CRITERIA, Criterion
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import Pattern, parse_pattern
from sqat.sparsity.schedules import SCHEDULES, Schedule
from sqat.sparsity.schedules.per_group import PerGroup
from sqat.sparsity.schedules.schedule import describe_skipped_masks

CriterionFn = Callable[[Tensor], Tensor]
ModelLoss = Callable[[nn.Module, Inputs], Tensor]


@dataclass(frozen=True)
class Masks:
    """Which weights of which layers stay.

    Attributes:
        kept: layer -> bool mask of its weight's shape, True where kept.
        patterns: layer -> ``N:M``.
        left: layer -> why it stays dense.
        notes: what permuting channels brought.
    """

    kept: Mapping[str, Tensor]
    patterns: Mapping[str, str]
    left: Mapping[str, str]
    notes: Sequence[str] = ()


def prune(
    model: nn.Module,
    pattern: str = "2:4",
    criterion: str | Criterion | CriterionFn = "magnitude",
    *,
    batches: Iterable[Inputs] = (),
    loss: ModelLoss | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    permute: bool = False,
) -> Masks:
    """Prune a model at once; its weights are plain afterwards, pruned ones +0.0.

    Training moves them again unless it runs under `masked`, `quantized` or with the masks of a `Pruner`.
    Arguments and errors as in `Pruner`.
    """
    with Pruner(
        model, 1, pattern, criterion, PerGroup(num_masks=1),
        batches=batches, loss=loss, include=include, exclude=exclude, permute=permute,
    ) as pruner:  # fmt: skip
        pruner.step()
    return pruner.masks


@contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Hold masks while a block of code trains the model: pruned weights are +0.0 in every forward pass and afterwards.

    An optimizer may be made before the block or in it: it holds the same parameters.

    Raises:
        SqatError: the masks are not this model's, or it is not plain.
    """
    check_plain(model)
    check_masks(model, masks.kept)
    transforms = insert_weights_(model, masks.kept, ())
    try:
        yield
    finally:
        remove_weights_(model, transforms)


class Pruner:
    """Prunes a model progressively while it trains; `finish`, or leaving the ``with`` block, gives plain weights back.

    Call `step` before each training step. Masks hold in every forward pass, pruned weights get no gradient, and what
    the optimizer does to them is forgotten. An optimizer may be made before or after the pruner.

    Args:
        steps: training steps to come; with too few of them masks on the way to N:M are left out, with a warning.
        pattern: ``N:M``, keep N of each M along the inputs.
        criterion: which weights matter: a name, one of `sqat.sparsity.criteria` with its settings, or any
            function from a weight [out,in] to scores of its shape, the highest of which stay.
        schedule: ``per-group`` or ``group-fraction``, or one of them with its settings; equal steps up to N:M.
        recovery_fraction: share of the steps after the last mask.
        batches: keyword arguments of the model's forward, for criteria that observe; gone through at every mask, all of
            them, so a list rather than a generator.
        loss: of the model and a batch, for criterion ``taylor``; default: the model's own, of ``labels``.
        include: globs over layer names; default: every linear of the encoder whose shape allows the pattern.
        exclude: globs of what is taken out again.
        permute: first put channels within blocks in an order that loses less, which the first of ``batches`` proves
            to change nothing; an optimizer that has stepped already does not know of it.

    Attributes:
        patterns: layer -> pattern.
        left: layer -> why it stays dense.
        notes: what permuting channels brought.

    Raises:
        SqatError: an unknown name, a glob that matches nothing, no layer left, no batches for a criterion that needs
            them, or a model that already has masks or quantizers.
        ValueError: a pattern, a share or a number of steps that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        pattern: str = "2:4",
        criterion: str | Criterion | CriterionFn = "magnitude",
        schedule: str | Schedule = "per-group",
        recovery_fraction: float = 0.8,
        *,
        batches: Iterable[Inputs] = (),
        loss: ModelLoss | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        permute: bool = False,
    ) -> None:
        check_plain(model)
        self.rules = Rules(choose_criterion(criterion), choose_schedule(schedule), recovery_fraction)
        if self.rules.criterion.statistics != "none" and isinstance(batches, Iterator):
            raise SqatError(f"criterion {self.rules.criterion.name} goes through batches at every mask",
                            "give a list or a DataLoader, not a generator")  # fmt: skip
        self.model, self.batches, self.loss = model, batches, loss or own_loss
        wanted = parse_pattern(pattern)
        layers = Layers(include=None if include is None else tuple(include), exclude=tuple(exclude))
        choice = choose_layers(model, layers, "prune", wanted.m)
        self.patterns: dict[str, Pattern] = dict.fromkeys(choice.chosen, wanted)
        self.left = choice.left
        self.moments = moments(self.rules, steps)
        self.taken = 0
        self.notes = self.permute() if permute else []
        self.transforms = self.insert()

    def permute(self) -> list[str]:
        """Put channels in an order that loses less; what it brought, in words."""
        device = next(self.model.parameters()).device
        inputs = next((model_inputs(batch, device) for batch in self.batches), None)
        if inputs is None:
            raise SqatError("permute needs a batch, to see that the model stays what it is", "give batches=[...]")
        return permute_(self.model, inputs, self.patterns, self.rules.criterion, self.gather)

    def insert(self) -> dict[str, WeightTransform]:
        """Masks that keep everything, to begin with."""
        ones = {name: torch.ones_like(layer(self.model, name).weight, dtype=torch.bool) for name in self.patterns}
        return insert_weights_(self.model, ones, ())

    def plan(self, steps: int) -> None:
        """Spread the masks over another number of training steps; those already set stay."""
        self.moments = moments(self.rules, steps)

    def step(self, number: int | None = None) -> None:
        """Set the masks of the training step that comes next, if it is one that the schedule changes them at.

        Args:
            number: of that step, from 0; default: one more than the last.
        """
        number = self.taken if number is None else number
        masking = Masking(self.model, self.transforms, self.patterns, self.rules, self.moments, self.gather)
        masking.before_step(number)
        self.taken = number + 1

    @property
    def done(self) -> bool:
        """Whether the masks are N:M, as the last ones are."""
        masks = {name: mask_of(transform) for name, transform in self.transforms.items()}
        return not any(count_violations(mask, self.patterns[name]) for name, mask in masks.items())

    @property
    def masks(self) -> Masks:
        """Copies of the masks as they are now, on the CPU."""
        kept = {name: mask_of(transform).cpu().clone() for name, transform in self.transforms.items()}
        return Masks(kept, {name: str(pattern) for name, pattern in self.patterns.items()}, self.left, self.notes)

    def finish(self) -> Masks:
        """Give plain weights back, pruned ones +0.0; a second call changes nothing.

        Raises:
            SqatError: `step` was not called often enough for the last masks; the weights are plain all the same.
        """
        self.remove()
        if not self.done:
            raise SqatError(f"pruning ended after {self.taken} steps, before those of step {max(self.moments)}",
                            "call step() before each training step, or plan fewer steps")  # fmt: skip
        return self.masks

    def remove(self) -> None:
        """Take the masks off, whatever they are; the pruned weights are +0.0."""
        attached = {name: it for name, it in self.transforms.items() if it in layer(self.model, name).modules()}
        remove_weights_(self.model, attached)

    def gather(self, leaders: Mapping[str, str]) -> dict[str, Tensor]:
        """What the criterion needs, of all batches."""
        criterion = self.rules.criterion
        if criterion.statistics == "none":
            return {}
        device, none, labels = next(self.model.parameters()).device, torch.empty(0), criterion.needs_labels

        def parts(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"loss": self.loss(model, batch.inputs)}

        with eval_mode(self.model):  # a loader draws its order as soon as it is asked
            stream = (Batch(model_inputs(batch, device, labels), none, none) for batch in self.batches)
            if (first := next(stream, None)) is None:
                raise SqatError(
                    f"criterion {criterion.name} needs batches", "give batches=[...] or criterion='magnitude'"
                )
            return sum_up(criterion, self.model, leaders, parts, itertools.chain([first], stream))

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.remove()


@dataclass(frozen=True)
class Rules:
    """As of a prune stage, but with any criterion."""

    criterion: Criterion
    schedule: Schedule
    recovery_fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.recovery_fraction < 1:
            raise ValueError(f"recovery_fraction must lie in [0, 1), got {self.recovery_fraction:g}")


@dataclass(frozen=True)
class OwnCriterion(Criterion):
    """A function of the user's own as a criterion."""

    function: CriterionFn
    name: str = "of your own"

    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return its scores, which must be floats of the weight's shape."""
        scores = self.function(weight)
        if scores.shape != weight.shape or not scores.is_floating_point():
            raise ValueError(f"scores {scores.dtype} {tuple(scores.shape)} of a weight {tuple(weight.shape)}")
        return scores.detach()


def choose_criterion(criterion: str | Criterion | CriterionFn) -> Criterion:
    """Return the criterion of a name, itself, or a function as one."""
    chosen: Criterion | CriterionFn = choose_part("criterion", criterion, CRITERIA, Criterion)
    return chosen if isinstance(chosen, Criterion) else OwnCriterion(chosen)


def choose_schedule(schedule: str | Schedule) -> Schedule:
    """Return the schedule of a name, or itself; its decay, which is a part of the loss, needs a recipe."""
    chosen: Schedule = choose_part("schedule", schedule, SCHEDULES, Schedule)
    if chosen.every_step:
        raise SqatError(
            f"schedule {chosen.name} needs a recipe: it adds to the loss", "take per-group or group-fraction"
        )
    return chosen


def moments(rules: Rules, steps: int) -> dict[int, int]:
    """Training step -> index of its sparsity; a warning where there is none for some."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    found = rules.schedule.mask_steps(steps, rules.recovery_fraction)
    if remark := describe_skipped_masks(found):
        warnings.warn(remark, stacklevel=3)
    return found


def own_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The loss that a transformers model computes of ``labels``."""
    loss: Tensor | None = model(**inputs).loss
    if loss is None:
        raise SqatError("the model has no loss for these batches", "put labels in the batches, or give loss=...")
    return loss
