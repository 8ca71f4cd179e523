"""What both chains look like from outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from scripts.benchmarks.beside_modelopt.sets import Trial


@dataclass(frozen=True)
class Made:
    """A finished model, fake-quantized as long as its block is open, and the treated weights as they are multiplied."""

    model: nn.Module
    weights: list[Tensor]


@dataclass(frozen=True)
class Phases:
    """A chain after its sparse training.

    Attributes:
        calibrations: names of the ways to choose scales.
        quantized: calibration -> the model fake-quantized and not trained further.
        qat: calibration, learning rate -> the finished model.
    """

    calibrations: tuple[str, ...]
    quantized: Callable[[str], AbstractContextManager[nn.Module]]
    qat: Callable[[str, float], AbstractContextManager[Made]]


Sparse = Callable[[Trial, nn.Module, float], Phases]  # of a trial, its teacher and a learning rate
