"""Scores that say which weights matter: the higher, the more a weight deserves to stay.

A criterion is a frozen dataclass. It says in ``needs`` what the stage has to gather before a mask is chosen, with the
masks of that moment in place, over ``samples`` train rows; gathered figures are sums, so that processes add theirs:

    nothing            the weight alone                               None
    squares            X'X's diagonal, of the layer's inputs           [C]
    gram               X'X                                             [C,C]
    gradients          of the stage's loss, summed over batches        the weight's shape
    gradient-squares   the same, squared before they are summed        the weight's shape

(C: the columns of `sqat.sparsity.features`.) It is called with the weight and that figure; `SparseGPT`, which moves
weights too, has `prune` instead. A new one joins the alias at the foot. Left out: scores that are learned while
training (movement pruning, arXiv:2005.07683).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sqat.sparsity.features import from_columns, to_columns
from sqat.sparsity.sparsegpt import SparseGPT


@dataclass(frozen=True)
class Magnitude:
    """|w|: what is smallest changes the output least, all inputs being alike."""

    name: Literal["magnitude"] = "magnitude"
    needs: ClassVar[Literal["nothing"]] = "nothing"

    def __call__(self, weight: Tensor, gathered: Tensor | None = None) -> Tensor:
        """Return scores of the shape of ``weight``, without gradient."""
        return weight.detach().abs()


@dataclass(frozen=True)
class Wanda:
    """|w| times the norm of its input (arXiv:2306.11695): a small weight on a large input matters too."""

    name: Literal["wanda"] = "wanda"
    samples: int = 256
    needs: ClassVar[Literal["squares"]] = "squares"

    def __post_init__(self) -> None:
        check_samples(self.samples)

    def __call__(self, weight: Tensor, gathered: Tensor | None) -> Tensor:
        """Return scores of the shape of ``weight``; ``gathered`` [C] is the sum of each input's squares."""
        norms = required(gathered).sqrt().to(weight.dtype)
        return from_columns(to_columns(weight.detach().abs()) * norms, weight.shape)


@dataclass(frozen=True)
class Taylor:
    """|w dL/dw|: how much the loss moves, to first order, if the weight goes (arXiv:1906.10771).

    ``average`` says how batches are brought together: the root of the mean of the squares, or the size of the mean,
    in which what pulls to both sides cancels.
    """

    name: Literal["taylor"] = "taylor"
    samples: int = 256
    average: Literal["squares", "mean"] = "squares"

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def needs(self) -> Literal["gradients", "gradient-squares"]:
        """What the batches' gradients are summed as."""
        return "gradients" if self.average == "mean" else "gradient-squares"

    def __call__(self, weight: Tensor, gathered: Tensor | None) -> Tensor:
        """Return scores of the shape of ``weight``; ``gathered`` is the sum of the gradients, or of their squares."""
        sums = required(gathered)
        size = sums.abs() if self.average == "mean" else sums.sqrt()
        return weight.detach().abs() * size.to(weight.dtype)


def check_samples(samples: int) -> None:
    """A criterion that observes needs a row."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")


def required(gathered: Tensor | None) -> Tensor:
    """What was gathered; ValueError without it."""
    if gathered is None:
        raise ValueError("nothing was gathered for a criterion that needs it")
    return gathered


Criterion = Magnitude | Wanda | Taylor | SparseGPT
