"""Scores that say which weights matter: the higher, the more a weight deserves to stay.

A criterion is a frozen dataclass called with a weight; a new one joins the alias at the foot. Left out:
scores that need gradients or activations (movement pruning arXiv:2005.07683, Wanda arXiv:2306.11695).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Magnitude:
    """|w|: what is smallest changes the output least, all inputs being alike."""

    name: Literal["magnitude"] = "magnitude"

    def __call__(self, weight: Tensor) -> Tensor:
        """Return scores of the shape of ``weight``, without gradient."""
        return weight.detach().abs()


Criterion = Magnitude
