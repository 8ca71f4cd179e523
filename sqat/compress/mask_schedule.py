"""Set the masks of a model while it trains: collect statistics, score weights, choose masks by a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sqat.data.batch import Batch
from sqat.distributed import uses_fsdp
from sqat.errors import SqatError
from sqat.modules.parametrize import WeightTransform, get_layer, insert_weights_, original_weight, remove_weights_
from sqat.sparsity.criteria import Criterion
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.schedules import Schedule
from sqat.training.data_parallel import Loss
from sqat.training.fsdp import summon_full_params

# From layer -> the layer under whose name its statistics are summed, to the statistics of the latter.
Collect = Callable[[Mapping[str, str]], Mapping[str, Tensor]]


class MaskSchedule:
    """Masks that grow to N:M while a model trains; `remove` gives plain weights back.

    Args:
        patterns: layer -> pattern, of the layers that are pruned.
        mask_steps: training step -> index of the schedule's sparsity that holds from it on.
        collect: computes the criterion's statistics (`sqat.compress.statistics`).
        masks: to start from; by default everything is kept. Masks of layers without a pattern stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        patterns: Mapping[str, Pattern],
        criterion: Criterion,
        schedule: Schedule,
        mask_steps: Mapping[int, int],
        collect: Collect,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.patterns, self.criterion, self.schedule = model, dict(patterns), criterion, schedule
        self.mask_steps, self.collect = mask_steps, collect
        keep_all = {name: torch.ones_like(get_layer(model, name).weight, dtype=torch.bool) for name in patterns}
        learn_all = patterns if schedule.every_step else ()
        self.transforms = insert_weights_(model, {**keep_all, **(masks or {})}, (), learn_all)

    def before_step(self, step: int) -> None:
        """Set the masks that hold from a training step on; statistics are collected with the current ones in place."""
        if step in self.mask_steps:
            with summon_full_params(self.model):
                self.set_masks(self.mask_steps[step])

    def set_masks(self, index: int) -> None:
        """Set the masks of one of the schedule's sparsities."""
        owners = weight_owners(self.model, self.patterns)
        statistics = self.collect(owners)
        for name in dict.fromkeys(owners.values()):
            self.set_mask(name, statistics.get(name), index)
        for name, owner in owners.items():
            mask_of(self.transforms[name]).copy_(mask_of(self.transforms[owner]))

    def set_mask(self, name: str, statistics: Tensor | None, index: int) -> None:
        """Choose the mask of one layer, and correct its weights where the criterion does."""
        weight, mask = original_weight(get_layer(self.model, name)).detach(), mask_of(self.transforms[name])
        pattern = self.patterns[name]
        sparsity = self.schedule.sparsities(pattern)[index]

        def choose(scores: Tensor) -> Tensor:
            return self.schedule.choose_mask(scores, pattern, sparsity, mask)

        try:
            chosen, corrected = self.criterion.prune(weight, statistics, mask, pattern, choose, self.schedule.regrow)
        except ValueError as error:
            problem = f"criterion {self.criterion.name} cannot prune {name}: {error}"
            hint = "exclude the layer, or choose criterion magnitude"
            raise SqatError(problem, hint, code="unsupported-model") from error
        mask.copy_(chosen)
        weight.copy_(corrected)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Copies of the current masks of the pruned layers, on the CPU."""
        return {name: mask_of(self.transforms[name]).cpu().clone() for name in self.patterns}

    @property
    def is_finished(self) -> bool:
        """Whether every mask has its pattern."""
        return not any(count_violations(mask, self.patterns[name]) for name, mask in self.masks.items())

    def remove(self) -> dict[str, Tensor]:
        """Take all masks off and return them; weights are plain then, pruned ones +0.0. A second call does nothing."""
        inserted = {name: it for name, it in self.transforms.items() if it in get_layer(self.model, name).modules()}
        return {name: mask.cpu() for name, mask in remove_weights_(self.model, inserted).items()}


def mask_of(transform: WeightTransform) -> Tensor:
    """The mask on a weight."""
    assert transform.mask is not None
    return transform.mask


def weight_owners(model: nn.Module, layers: Mapping[str, object]) -> dict[str, str]:
    """Layer -> the first layer with the same weight, itself for most; a shared weight is scored once."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(original_weight(get_layer(model, name))), name) for name in layers}


def with_mask_decay(loss: Loss, masks: MaskSchedule) -> Loss:
    """Wrap a loss so that it also returns the schedule's decay of pruned weights, where there is one."""
    schedule = masks.schedule
    if not schedule.decay:
        return loss
    if uses_fsdp():
        problem = f"schedule {schedule.name} decays weights, which FSDP splits between processes"
        raise SqatError(problem, "set decay: 0, or start without --use_fsdp", code="recipe-conflict")
    owners = dict.fromkeys(weight_owners(masks.model, masks.patterns).values())

    def decayed(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        parts = [
            schedule.decay_loss(original_weight(get_layer(masks.model, name)), mask_of(masks.transforms[name]))
            for name in owners
        ]
        return {**loss(model, batch), "decay": torch.stack(parts).sum()}

    return decayed
