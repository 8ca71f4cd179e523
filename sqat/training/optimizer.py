"""The optimizer and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from sqat.modules.activation_quantizers import QUANTIZERS
from sqat.quantization.fake_quant import HIGH
from sqat.recipe.stages import TrainConfig


def learning_rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step (from 0) as a share of its peak: linear warm-up, then decay to 0."""
    warmup = int(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    if config.lr_schedule == "constant":
        return 1.0
    return 1 - share if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's own ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["factor"] * rate


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make AdamW or SGD; biases, norms and learned amax are not decayed."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    amax = [p for name, p in named if name.startswith(f"{QUANTIZERS}.")]
    others = [p for name, p in named if not name.startswith(f"{QUANTIZERS}.")]
    # A learned amax is 127 scales. Adam's steps do not grow with the gradient, so 127 times the rate moves the scale
    # as LSQ means it (arXiv:1902.08153).
    factor = float(HIGH) if config.optimizer == "adamw" else 1.0
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, "factor": 1.0},
        {"params": amax, "weight_decay": 0.0, "factor": factor},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)  # much faster than the default on a CPU
