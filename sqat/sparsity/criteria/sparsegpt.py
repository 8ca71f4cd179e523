"""SparseGPT (arXiv:2301.00774): prune what costs least and let the other weights make up for it.

A layer computes x W'. With H = X'X over its inputs, removing weight w_j and moving the weights behind it costs
w_j^2 / [H^-1]_jj (Optimal Brain Surgeon).

Shapes: O outputs, C columns (see `sqat.sparsity.columns`), B columns of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sqat.sparsity.criteria.criterion import Criterion, Statistic, check_samples, require
from sqat.sparsity.criteria.wanda import Wanda

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.sparsity.pattern import Pattern

BLOCK = 128  # columns swept before those to their right are updated; changes the speed, not the result


@dataclass(frozen=True)
class SparseGPT(Criterion):
    """Prune by the Hessian of the layer's output and correct the weights that stay (arXiv:2301.00774).

    Attributes:
        samples: train rows that X'X is computed from, before each mask.
        damping: is added to the diagonal of X'X, as a share of its mean.
    """

    name: Literal["sparsegpt"] = "sparsegpt"
    samples: int = 256
    damping: float = 0.01
    statistics: ClassVar[Statistic] = "gram"
    score_name: ClassVar[str] = "wanda"

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be a number above 0, got {self.damping:g}")

    def score(self, weight: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return the scores of `Wanda`, by which channels are permuted.

        SparseGPT's own costs depend on the order of the columns.
        """
        return Wanda().score(weight, require(statistics).diagonal())

    def prune(
        self,
        weight: Tensor,
        statistics: Tensor | None,
        mask: Tensor,
        pattern: Pattern,
        choose: Callable[[Tensor], Tensor],
        regrow: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Choose the mask during the sweep; ``choose`` fixes before it how many weights each group keeps."""
        import torch

        from sqat.sparsity.columns import from_columns, to_columns
        from sqat.sparsity.masks import split_groups

        weight = weight.detach() * mask
        precise = torch.float32 if weight.device.type == "mps" else torch.float64
        columns = to_columns(weight).to(precise)
        factor = factor_inverse(require(statistics).to(precise), self.damping)
        costs = from_columns((columns / factor.diagonal()).square(), weight.shape)
        initial = to_columns(choose(costs if regrow else costs.masked_fill(~mask, 0.0)))
        counts = split_groups(initial, pattern.m, 1).sum(2, dtype=torch.uint8)
        allowed = torch.ones_like(initial) if regrow else to_columns(mask)
        chosen, swept = sweep(columns, factor, pattern.m, counts, allowed)
        return from_columns(chosen, weight.shape), from_columns(swept, weight.shape).to(weight.dtype)


def factor_inverse(gram: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U [C,C] with U'U = H^-1.

    H is ``gram`` [C,C] plus ``damping`` times its mean diagonal. Row j of U times U_jj is the first row of the inverse
    of H[j:, j:]. A gram matrix of zeros (dead inputs) counts as the identity.

    Raises:
        ValueError: H is not positive definite.
    """
    import torch

    mean = float(gram.diagonal().mean())
    hessian = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (damping * mean or 1.0)
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if bool(failed):
        raise ValueError(f"X'X of {len(gram)} inputs has no inverse with damping {damping:g}")
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def sweep(
    weight: Tensor, factor: Tensor, m: int, counts: Tensor, allowed: Tensor, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Sweep columns from left to right: choose each group's weights, spread the error of pruned ones to the right.

    Args:
        weight: [O,C].
        factor: of `factor_inverse`.
        counts: uint8 [O, C / m], weights that each group keeps.
        allowed: bool [O,C], False where a weight must not be kept.

    Returns:
        The mask, and the weights that stay (0 elsewhere).
    """
    weight, mask = weight.clone(), allowed.new_zeros(allowed.shape)
    size = max(1, block // m) * m
    for start in range(0, weight.shape[1], size):
        inside, behind = slice(start, start + size), slice(start + size, None)
        part = factor[inside, inside]
        swept = sweep_block(weight[:, inside], part, m, counts[:, start // m :], allowed[:, inside])
        mask[:, inside], weight[:, inside], errors = swept
        weight[:, behind] -= errors @ factor[inside, behind]
    return mask, weight * mask


def sweep_block(
    weight: Tensor, factor: Tensor, m: int, counts: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep one block and return mask, weights and the errors for the columns behind it, [O,B] each."""
    from sqat.sparsity.masks import rank_groups

    weight, mask, errors = weight.clone(), allowed.new_zeros(allowed.shape), weight.new_zeros(weight.shape)
    scales = factor.diagonal()
    for i in range(weight.shape[1]):
        if i % m == 0:
            group = slice(i, i + m)
            costs = (weight[:, group] / scales[group]).square().masked_fill(~allowed[:, group], -math.inf)
            mask[:, group] = rank_groups(costs, m) < counts[:, i // m, None]
        errors[:, i] = weight[:, i].masked_fill(mask[:, i], 0.0) / scales[i]
        weight[:, i:] -= errors[:, i, None] * factor[i, i:]
    return mask, weight, errors
