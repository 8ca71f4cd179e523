"""Taylor (arXiv:1906.10771): how much the loss moves, to first order, if a weight goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.sparsity.criteria.criterion import Criterion, Statistic, check_samples, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Taylor(Criterion):
    """|w dL/dw|: how much the loss moves, to first order, if the weight goes (arXiv:1906.10771).

    Attributes:
        samples: train rows that the gradients are computed from, before each mask.
        average: over batches: the root of the mean of the squares, or the absolute value of the mean, in which
            gradients of opposite signs cancel.
    """

    name: Literal["taylor"] = "taylor"
    samples: int = 256
    average: Literal["squares", "mean"] = "squares"

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def statistics(self) -> Statistic:
        """How the gradients of batches are summed."""
        return "gradients" if self.average == "mean" else "squared_gradients"

    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return |w| times the averaged gradient, up to a constant factor."""
        sums = require(statistics)
        gradients = sums.abs() if self.average == "mean" else sums.sqrt()
        return weight.detach().abs() * gradients.to(weight.dtype)
