"""Progressive pruning inside `transformers.Trainer`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sqat.api.arguments import Inputs
from sqat.api.prune import CriterionFn, Masks, ModelLoss, Pruner
from sqat.errors import SqatError
from sqat.sparsity.criteria import Criterion
from sqat.sparsity.schedules import Schedule

UNKNOWN_STEPS = 10**9  # until the Trainer says how many


class SparseCallback(TrainerCallback):
    """Prunes a model over the steps of one ``train()``, and leaves plain weights, pruned ones +0.0.

    Make it before ``train()``, with the Trainer's own model: it inserts the masks at once.

    Resume with a new callback of the same arguments and ``train(resume_from_checkpoint=...)``. A checkpoint that the
    Trainer writes midway holds plain weights for ``from_pretrained``, pruned as far as the masks were.

    If training stops before the last masks, or the best checkpoint is from before them, they are set at the end, with a
    warning. If ``train()`` raises, the masks stay: ``callback.pruner.remove()`` gives plain weights back.

    Args:
        model: of the Trainer. The others are those of `Pruner`; the steps are the Trainer's.

    Attributes:
        pruner: its ``masks`` are what `quantized` and `export_onnx` take.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str = "2:4",
        criterion: str | Criterion | CriterionFn = "magnitude",
        schedule: str | Schedule = "per-group",
        recovery_fraction: float = 0.8,
        *,
        batches: Iterable[Inputs] = (),
        loss: ModelLoss | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        self.pruner = Pruner(
            model, UNKNOWN_STEPS, pattern, criterion, schedule, recovery_fraction,
            batches=batches, loss=loss, include=include, exclude=exclude,
        )  # fmt: skip
        self.finished = False

    @property
    def masks(self) -> Masks:
        """Copies of the current masks."""
        return self.pruner.masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Spread the masks over the Trainer's steps."""
        if self.finished:
            raise SqatError("this SparseCallback has already pruned its model", "make another one for another train()",
                            code="usage")  # fmt: skip
        self.pruner.plan(state.max_steps)
        self.pruner.steps_taken = state.global_step
        masks = self.pruner.masks.kept.values()
        if state.global_step > min(self.pruner.mask_schedule.mask_steps) and all(bool(mask.all()) for mask in masks):
            raise SqatError(f"the checkpoint of step {state.global_step} holds no masks: it was written without "
                            "SparseCallback", "load it as a model, and train from the start",
                            code="damaged-checkpoint")  # fmt: skip

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the masks of this step."""
        self.pruner.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the last masks if training ended before them, with a warning, and make the weights plain again."""
        last = max(self.pruner.mask_schedule.mask_steps)
        if not self.pruner.done:
            reason = f"training stopped, or the best checkpoint was written, before the last masks of step {last}"
            warnings.warn(f"{reason}: they are set now, and nothing was trained after them", stacklevel=2)
            self.pruner.step(last)
        self.pruner.finish()
        self.finished = True
