"""What several tests of training use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sqat.recipe.stages import TrainConfig


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def replace_config(config: TrainConfig, **changes: Any) -> TrainConfig:
    return config.model_copy(update=changes)
