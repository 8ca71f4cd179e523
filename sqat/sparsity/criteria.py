"""Scores that say which weights matter: the higher, the more a weight deserves to stay.

A criterion (`sqat.sparsity.settings`) says in ``needs`` what the stage has to gather before a mask is chosen, with the
masks of that moment in place, over ``samples`` train rows; gathered figures are sums, so that processes add theirs:

    nothing            the weight alone                               None
    squares            X'X's diagonal, of the layer's inputs           [C]
    gram               X'X                                             [C,C]
    gradients          of the stage's loss, summed over batches        the weight's shape
    gradient-squares   the same, squared before they are summed        the weight's shape

(C: the columns of `sqat.sparsity.features`.) `score` is called with the criterion, the weight and that figure;
`SparseGPT`, which moves weights too, is pruned with by `sqat.sparsity.sparsegpt` instead. Left out: scores that are
learned while training (movement pruning, arXiv:2005.07683).
"""

from __future__ import annotations

from torch import Tensor

from sqat.sparsity.features import from_columns, to_columns
from sqat.sparsity.settings import Magnitude, Taylor, Wanda

Scored = Magnitude | Wanda | Taylor


def score(criterion: Scored, weight: Tensor, gathered: Tensor | None = None) -> Tensor:
    """Return scores of the shape of ``weight``, without gradient.

    Args:
        gathered: what the criterion needs, as the module says.

    Raises:
        ValueError: the criterion needs something, and nothing was gathered.
    """
    size = weight.detach().abs()
    match criterion:
        case Magnitude():
            return size
        case Wanda():
            norms = required(gathered).sqrt().to(weight.dtype)
            return from_columns(to_columns(size) * norms, weight.shape)
        case Taylor():
            sums = required(gathered)
            moves = sums.abs() if criterion.average == "mean" else sums.sqrt()
            return size * moves.to(weight.dtype)


def required(gathered: Tensor | None) -> Tensor:
    """What was gathered; ValueError without it."""
    if gathered is None:
        raise ValueError("nothing was gathered for a criterion that needs it")
    return gathered
