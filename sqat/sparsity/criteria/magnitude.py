"""Magnitude: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.sparsity.criteria.criterion import Criterion

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Magnitude(Criterion):
    """|w|: the smallest weights change the output least, where all inputs are alike."""

    name: Literal["magnitude"] = "magnitude"

    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return |w|."""
        return weight.detach().abs()
