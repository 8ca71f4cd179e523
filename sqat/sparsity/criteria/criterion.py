"""What every criterion has: settings, the statistics that it needs, and scores.

Torch is imported where tensors are handled only: a recipe is checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.sparsity.pattern import Pattern

# What a criterion may know of a layer: sums over batches, computed with the current masks in place.
# C counts the columns of `sqat.sparsity.columns`.
Statistic = Literal[
    "none",
    "input_squares",  # diagonal of X'X, [C], where X are the layer's inputs
    "gram",  # X'X, [C, C]
    "gradients",  # gradients of the loss, in the shape of the weight
    "squared_gradients",  # the same, squared before they are summed
]


class Criterion(ABC):
    """Base of all criteria; a subclass is a frozen dataclass whose fields are the keys of a recipe."""

    name: str
    samples: int = 0  # train rows that the statistics are computed from

    @property
    def statistics(self) -> Statistic:
        """What `score` needs to know of a layer."""
        return "none"

    @property
    def needs_labels(self) -> bool:
        """Whether the statistics are computed from a loss."""
        return self.statistics in ("gradients", "squared_gradients")

    @property
    def score_name(self) -> str:
        """Name of the criterion whose scores `score` returns."""
        return self.name

    @abstractmethod
    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return scores of the shape of ``weight``, without gradient; the highest stay.

        Raises:
            ValueError: the criterion needs statistics and got none.
        """

    def prune(
        self,
        weight: Tensor,
        statistics: Tensor | None,
        mask: Tensor,
        pattern: Pattern,
        choose: Callable[[Tensor], Tensor],
        regrow: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Choose the next mask of a layer and, where a criterion corrects weights, correct them.

        Args:
            weight: as it is trained, pruned entries included.
            mask: the current one, bool, in the shape of ``weight``.
            choose: scores -> mask, the rule of the schedule.
            regrow: whether a pruned weight may return.

        Returns:
            Mask and weight.

        Raises:
            ValueError: sizes do not fit, or the statistics cannot be used.
        """
        return choose(self.score(weight, statistics)), weight


def check_samples(samples: int) -> None:
    """Raise ValueError unless there is a row to compute statistics from."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")


def require(statistics: Tensor | None) -> Tensor:
    """Return the statistics; ValueError where there are none."""
    if statistics is None:
        raise ValueError("the criterion needs statistics of the layer, and got none")
    return statistics
