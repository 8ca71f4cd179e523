"""Observe a model in the middle of training, without a trace in what training draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Put a model in eval mode, with random numbers of its own; restore both afterwards."""
    training = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, was_training in training.items():
                module.training = was_training
