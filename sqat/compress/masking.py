"""Sets the masks of a prune stage at the moments of its schedule: gather, score, choose, and correct by some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sqat.data.dataset import Batch
from sqat.distributed import uses_fsdp
from sqat.errors import SqatError
from sqat.modules.parametrize import WeightTransform, layer, original_weight
from sqat.sparsity.criteria import Criterion
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.schedules import Schedule
from sqat.training.data_parallel import Loss
from sqat.training.fsdp import summon_full_params

Gather = Callable[[Mapping[str, str]], Mapping[str, Tensor]]


class Rules(Protocol):
    """Which weights go, how many, and when: of a recipe's prune stage, or of a loop of the user's own."""

    @property
    def criterion(self) -> Criterion: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def recovery_fraction(self) -> float: ...


@dataclass(frozen=True)
class Masking:
    """The masks under way.

    Attributes:
        transforms: of the layers this stage prunes; each has a mask.
        patterns: of the same layers.
        moments: training step -> index of a sparsity.
        gather: gives what the criterion needs (see `sqat.compress.statistics`).
    """

    model: nn.Module
    transforms: Mapping[str, WeightTransform]
    patterns: Mapping[str, Pattern]
    config: Rules
    moments: Mapping[int, int]
    gather: Gather

    def before_step(self, step: int) -> None:
        """Set the masks of a moment; what is gathered is gathered with those of the one before in place."""
        if step in self.moments:
            with summon_full_params(self.model):
                self.set_masks(self.moments[step])

    def set_masks(self, index: int) -> None:
        """Set the masks of one of the schedule's sparsities."""
        leaders = shared_weights(self.model, self.transforms)
        gathered = self.gather(leaders)
        for leader in dict.fromkeys(leaders.values()):
            self.set_mask(leader, gathered.get(leader), index)
        for name, leader in leaders.items():
            mask_of(self.transforms[name]).copy_(mask_of(self.transforms[leader]))

    def set_mask(self, name: str, gathered: Tensor | None, index: int) -> None:
        """Choose the mask of one layer, and correct its weights where the criterion does."""
        weight, mask = original_weight(layer(self.model, name)).detach(), mask_of(self.transforms[name])
        try:
            chosen, corrected = self.choose(name, weight, gathered, index)
        except ValueError as error:
            raise SqatError(f"{name} cannot be pruned by {self.config.criterion.name}: {error}") from error
        mask.copy_(chosen)
        weight.copy_(corrected)

    def choose(self, name: str, weight: Tensor, gathered: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
        """The mask and the weight of a moment."""
        pattern, previous = self.patterns[name], mask_of(self.transforms[name])
        schedule, criterion = self.config.schedule, self.config.criterion
        sparsity = schedule.sparsities(pattern)[index]

        def by_schedule(scores: Tensor) -> Tensor:
            return schedule.choose_mask(scores, pattern, sparsity, previous)

        return criterion.prune(weight, gathered, previous, pattern, by_schedule, schedule.regrow)


def mask_of(transform: WeightTransform) -> Tensor:
    """The mask that this stage put on a weight."""
    assert transform.mask is not None
    return transform.mask


def shared_weights(model: nn.Module, names: Mapping[str, object]) -> dict[str, str]:
    """Layer -> the first layer that has the same weight, itself mostly; such a weight is judged once."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(original_weight(layer(model, name))), name) for name in names}


def with_decay(loss: Loss, masking: Masking) -> Loss:
    """The loss, and for schedule sr-ste the decay of pruned weights as a part of it."""
    schedule = masking.config.schedule
    if not schedule.decay:
        return loss
    if uses_fsdp():
        raise SqatError(f"schedule {schedule.name} decays weights that FSDP shares out between processes",
                        "set decay: 0, or start without --use_fsdp")  # fmt: skip
    leaders = dict.fromkeys(shared_weights(masking.model, masking.transforms).values())

    def decayed(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        parts = [
            schedule.decay_loss(original_weight(layer(masking.model, name)), mask_of(masking.transforms[name]))
            for name in leaders
        ]
        return {**loss(model, batch), "decay": torch.stack(parts).sum()}

    return decayed
