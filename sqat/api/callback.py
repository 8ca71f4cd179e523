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

UNKNOWN = 10**9  # steps, until the Trainer says how many


class SparseCallback(TrainerCallback):
    """Prunes a model over the steps of one ``train()``, and leaves plain weights, pruned ones +0.0.

    Masks are put on when the callback is made, so make it before ``train()``, with the very model of the Trainer.

    Resuming: a checkpoint that the Trainer writes midway holds masks and the weights under them, under names of
    `torch.nn.utils.parametrize`. ``train(resume_from_checkpoint=...)`` with a new callback of the same arguments
    goes on from it as if it had not stopped. Such a folder is not for ``from_pretrained``: save the model after
    ``train()``. A checkpoint that was written without the callback is refused once a mask should have been set.

    If training stops before the last masks, or the best checkpoint is loaded and has earlier ones, they are set at the
    end, with a warning. If ``train()`` raises, the masks stay on the model, for the Trainer then tells its callbacks
    nothing: ``callback.pruner.remove()`` gives plain weights back.

    Args:
        model: of the Trainer. The others are those of `Pruner`; steps are the Trainer's.

    Attributes:
        pruner: whose ``masks`` are what `quantized` and `export_onnx` take.
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
            model, UNKNOWN, pattern, criterion, schedule, recovery_fraction,
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
        if state.global_step > min(self.pruner.schedule.mask_steps) and all(bool(mask.all()) for mask in masks):
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
        """Give the model its plain weights back."""
        last = max(self.pruner.schedule.mask_steps)
        if not self.pruner.done:
            reason = f"training stopped, or the best checkpoint was written, before the last masks of step {last}"
            warnings.warn(f"{reason}: they are set now, and nothing was trained after them", stacklevel=2)
            self.pruner.step(last)
        self.pruner.finish()
        self.finished = True
