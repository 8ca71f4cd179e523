"""N:M pruning in a training loop of your own: at once, or step by step while the model trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from sqat.api.arguments import Inputs, check_masks, check_unchanged, choose_part, model_inputs, select_layers
from sqat.compress.eval_mode import eval_mode
from sqat.compress.idle_layers import find_idle_layers
from sqat.compress.mask_schedule import MaskSchedule
from sqat.compress.patterns import choose_patterns
from sqat.compress.permute import permute_
from sqat.compress.statistics import collect_statistics
from sqat.data.batch import Batch
from sqat.errors import SqatError
from sqat.models.conv1d import linears_for_conv1d
from sqat.modules.parametrize import insert_weights_, remove_weights_
from sqat.modules.plain_state import remove_all, save_plain_weights_
from sqat.sparsity.criteria import CRITERIA, Criterion
from sqat.sparsity.schedules import SCHEDULES, Schedule
from sqat.sparsity.schedules.per_group import PerGroup
from sqat.sparsity.schedules.schedule import describe_skipped_masks

CriterionFn = Callable[[Tensor], Tensor]
ModelLoss = Callable[[nn.Module, Inputs], Tensor]


@dataclass(frozen=True)
class Masks:
    """Which weights of which layers stay.

    Attributes:
        kept: layer -> bool mask of its weight's shape, [out,in] also for a Conv1D, True where kept.
        patterns: layer -> ``N:M``.
        skipped: layer -> why it stays dense.
        notes: what permuting channels gained.
    """

    kept: Mapping[str, Tensor]
    patterns: Mapping[str, str]
    skipped: Mapping[str, str]
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

    Training makes pruned weights non-zero again, unless it runs under `masked`, `quantized` or a `Pruner`.
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

    The optimizer may be made before the block or in it.

    Raises:
        SqatError: the masks are not this model's, or it already has masks or quantizers.
    """
    check_unchanged(model)
    with linears_for_conv1d(model):
        check_masks(model, masks.kept)
        transforms = insert_weights_(model, masks.kept, ())
        hooks = save_plain_weights_(model, transforms)
        try:
            yield
        finally:
            remove_all(hooks)
            remove_weights_(model, transforms)


class Pruner:
    """Prunes a model progressively while it trains; `finish`, or leaving the ``with`` block, gives plain weights back.

    Call `step` before each training step. Masks hold in every forward pass and pruned weights get no gradient. The
    optimizer may be made before or after the pruner.

    Args:
        steps: training steps to come; with too few of them masks on the way to N:M are skipped, with a warning.
        pattern: ``N:M``, keep N of each M along the inputs.
        criterion: which weights matter: a name, one of `sqat.sparsity.criteria` with its settings, or any
            function from a weight [out,in] to scores of its shape, the highest of which stay.
        schedule: ``per-group`` or ``group-fraction``, or one of them with its settings; equal steps up to N:M.
        recovery_fraction: share of the steps after the last mask.
        batches: arguments of the model's forward, for criteria that need statistics. All are read at every mask, so
            give a list or a loader, not a generator. Layers that the first never calls stay dense.
        loss: of the model and a batch, for criterion ``taylor``; default: the model's own, of ``labels``.
        include: globs over layer names; default: every linear of the encoder whose shape allows the pattern.
        exclude: globs of layers that stay dense.
        permute: first reorder channels within blocks so that pruning loses less; the first of ``batches`` proves
            that the model stays the same. Use an optimizer that has not stepped yet.

    Attributes:
        patterns: layer -> pattern.
        skipped: layer -> why it stays dense.
        notes: what permuting channels gained.

    Raises:
        SqatError: an unknown name, a glob that matches no layer, no layer to prune, no batches for a criterion that
            needs them, or a model that already has masks or quantizers.
        ValueError: an impossible pattern, share or number of steps.
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
        check_unchanged(model)
        if not 0 <= recovery_fraction < 1:
            raise ValueError(f"recovery_fraction must lie in [0, 1), got {recovery_fraction:g}")
        self.criterion, self.recovery_fraction = choose_criterion(criterion), recovery_fraction
        schedule = choose_schedule(schedule)
        if self.criterion.statistics != "none" and isinstance(batches, Iterator):
            raise SqatError(f"criterion {self.criterion.name} reads all batches at every mask",
                            "give a list or a DataLoader, not a generator", code="usage")  # fmt: skip
        self.model, self.batches, self.loss = model, batches, loss or model_loss
        layers = select_layers(include, exclude)
        with ExitStack() as undo:
            undo.enter_context(linears_for_conv1d(model))
            self.patterns, self.skipped = choose_patterns(model, layers, pattern, idle=self.find_idle_layers())
            mask_steps = plan_mask_steps(schedule, steps, recovery_fraction)
            self.notes = self.permute() if permute else []
            self.mask_schedule = MaskSchedule(model, self.patterns, self.criterion, schedule, mask_steps, self.collect)
            undo.callback(self.mask_schedule.remove)
            undo.callback(remove_all, save_plain_weights_(model, self.mask_schedule.transforms, masks=True))
            self.undo = undo.pop_all()
        self.steps_taken = 0

    def find_idle_layers(self) -> set[str]:
        """Return the layers that the first batch never calls; none where a batch can be read once only."""
        inputs = None if isinstance(self.batches, Iterator) else self.first_inputs()
        return set() if inputs is None else find_idle_layers(self.model, inputs)

    def first_inputs(self) -> dict[str, Tensor] | None:
        """Return the first batch on the model's device; the caller's random numbers stay."""
        device = next(self.model.parameters()).device
        with eval_mode(self.model):
            return next((model_inputs(batch, device) for batch in self.batches), None)

    def permute(self) -> list[str]:
        """Reorder channels so that pruning loses less; returns notes."""
        inputs = self.first_inputs()
        if inputs is None:
            raise SqatError("permute needs a batch, to prove that the model stays the same", "give batches=[...]",
                            code="no-rows")  # fmt: skip
        return permute_(self.model, inputs, self.patterns, self.criterion, self.collect)

    def plan(self, steps: int) -> None:
        """Spread the masks over another number of training steps; masks that are already set stay."""
        self.mask_schedule.mask_steps = plan_mask_steps(self.mask_schedule.schedule, steps, self.recovery_fraction)

    def step(self, number: int | None = None) -> None:
        """Set the masks of the next training step, if the schedule changes them there.

        Args:
            number: of that step, from 0; default: one more than the last.
        """
        number = self.steps_taken if number is None else number
        self.mask_schedule.before_step(number)
        self.steps_taken = number + 1

    @property
    def done(self) -> bool:
        """Whether the masks are N:M."""
        return self.mask_schedule.is_finished

    @property
    def masks(self) -> Masks:
        """Copies of the current masks, on the CPU."""
        patterns = {name: str(pattern) for name, pattern in self.patterns.items()}
        return Masks(self.mask_schedule.masks, patterns, self.skipped, self.notes)

    def finish(self) -> Masks:
        """Give plain weights back, pruned ones +0.0; a second call changes nothing.

        Raises:
            SqatError: the last masks were not set, since `step` was not called often enough; weights are plain anyway.
        """
        self.remove()
        if not self.done:
            last = max(self.mask_schedule.mask_steps)
            raise SqatError(f"pruning ended after {self.steps_taken} steps, before the last masks of step {last}",
                            "call step() before each training step, or plan fewer steps", code="usage")  # fmt: skip
        return self.masks

    def remove(self) -> None:
        """Take the current masks off; the pruned weights are +0.0."""
        self.undo.close()

    def collect(self, owners: Mapping[str, str]) -> dict[str, Tensor]:
        """Collect the criterion's statistics over all batches."""

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"loss": self.loss(model, batch.inputs)}

        return collect_statistics(self.criterion, self.model, owners, loss, self.read_batches())

    def read_batches(self) -> Iterator[Batch]:
        """Yield all batches on the model's device; a loader draws nothing before the first is read."""
        device, unused, empty = next(self.model.parameters()).device, torch.empty(0), True
        for batch in self.batches:
            empty = False
            yield Batch(model_inputs(batch, device, self.criterion.needs_labels), unused, unused)
        if empty:
            raise SqatError(f"criterion {self.criterion.name} needs batches",
                            "give batches=[...] or criterion='magnitude'", code="no-rows")  # fmt: skip

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
class OwnCriterion(Criterion):
    """A user's function as a criterion."""

    function: CriterionFn
    name: str = "function"

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
    """Return the schedule of a name, or itself; a schedule with a decay, which is part of the loss, needs a recipe."""
    chosen: Schedule = choose_part("schedule", schedule, SCHEDULES, Schedule)
    if chosen.every_step:
        raise SqatError(f"schedule {chosen.name} needs a recipe: it adds to the loss", "take per-group or "
                        "group-fraction", code="usage")  # fmt: skip
    return chosen


def plan_mask_steps(schedule: Schedule, steps: int, recovery_fraction: float) -> dict[int, int]:
    """Training step -> index of its sparsity; warns where some masks are skipped."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    mask_steps = schedule.mask_steps(steps, recovery_fraction)
    if warning := describe_skipped_masks(mask_steps):
        warnings.warn(warning, stacklevel=3)
    return mask_steps


def model_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The loss that a transformers model computes from ``labels``."""
    loss: Tensor | None = model(**inputs).loss
    if loss is None:
        raise SqatError("the model has no loss for these batches", "put labels in the batches, or give loss=...",
                        code="usage")  # fmt: skip
    return loss
