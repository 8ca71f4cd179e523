"""Wanda (arXiv:2306.11695): a small weight on a large input matters too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sqat.sparsity.criteria.criterion import Criterion, Statistic, check_samples, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Wanda(Criterion):
    """|w| times the norm of its input (arXiv:2306.11695): a small weight on a large input matters too.

    Attributes:
        samples: train rows that the norms are computed from, before each mask.
    """

    name: Literal["wanda"] = "wanda"
    samples: int = 256
    statistics: ClassVar[Statistic] = "input_squares"

    def __post_init__(self) -> None:
        check_samples(self.samples)

    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return |w| times the norms of the columns' inputs."""
        from sqat.sparsity.columns import from_columns, to_columns

        norms = require(statistics).sqrt().to(weight.dtype)
        return from_columns(to_columns(weight.detach().abs()) * norms, weight.shape)
