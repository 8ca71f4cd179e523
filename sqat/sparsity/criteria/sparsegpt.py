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
TOLERANCE, MAX_ITERATIONS = 1e-3, 100  # of `refit`


@dataclass(frozen=True)
class SparseGPT(Criterion):
    """Prune by the Hessian of the layer's output and correct the weights that stay (arXiv:2301.00774).

    Attributes:
        samples: train rows that X'X is computed from, before each mask.
        damping: is added to the diagonal of X'X, as a share of its mean.
        refit: then solve for all weights that stay at once. The sweep corrects only those behind a pruned weight.
    """

    name: Literal["sparsegpt"] = "sparsegpt"
    samples: int = 256
    damping: float = 0.01
    refit: bool = True
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
        hessian = damp(require(statistics).to(precise), self.damping)
        factor = factor_inverse(hessian, self.damping)
        costs = from_columns((columns / factor.diagonal()).square(), weight.shape)
        initial = to_columns(choose(costs if regrow else costs.masked_fill(~mask, 0.0)))
        counts = split_groups(initial, pattern.m, 1).sum(2, dtype=torch.uint8)
        allowed = torch.ones_like(initial) if regrow else to_columns(mask)
        chosen, swept = sweep(columns, factor, pattern.m, counts, allowed)
        if self.refit:
            swept = refit(columns.float(), chosen, swept.float(), hessian.float())
        return from_columns(chosen, weight.shape), from_columns(swept, weight.shape).to(weight.dtype)


def damp(gram: Tensor, damping: float) -> Tensor:
    """Return H: ``gram`` [C,C] plus ``damping`` times its mean diagonal; the identity for zeros (dead inputs)."""
    import torch

    mean = float(gram.diagonal().mean())
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (damping * mean or 1.0)


def factor_inverse(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U [C,C] with U'U = H^-1.

    Row j of U times U_jj is the first row of the inverse of H[j:, j:].

    Args:
        damping: for the error.

    Raises:
        ValueError: H is not positive definite.
    """
    import torch

    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if bool(failed):
        raise ValueError(f"X'X of {len(hessian)} inputs has no inverse with damping {damping:g}")
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


def refit(weight: Tensor, mask: Tensor, start: Tensor, hessian: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Return the weights that stay, so that the layer's output is nearest to that of ``weight``; 0 elsewhere.

    With S the weights that stay, w' solves H_SS w'_S = (H w)_S in each row: conjugate gradients for all rows at once,
    preconditioned by the diagonal of H. No step makes the error of a row larger.

    Args:
        weight: [O,C], before the mask.
        mask: bool [O,C].
        start: [O,C], 0 outside of the mask.
        hessian: of `damp`.
        tolerance: residual that is left, as a share of that of w' = 0.
    """
    diagonal, target = hessian.diagonal(), (weight @ hessian) * mask
    solution, residual = start, target - (start @ hessian) * mask
    direction = residual / diagonal
    size = (residual * direction).sum(1, keepdim=True)
    goal = tolerance**2 * (target.square() / diagonal).sum(1, keepdim=True)
    for _ in range(MAX_ITERATIONS):
        if bool((size <= goal).all()):
            break
        curved = (direction @ hessian) * mask
        step = divide(size, (direction * curved).sum(1, keepdim=True))
        solution, residual = solution + step * direction, residual - step * curved
        scaled, previous = residual / diagonal, size
        size = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + divide(size, previous) * direction
    return solution


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where a row is solved and both are 0."""
    return (numerator / denominator).masked_fill(denominator == 0, 0.0)
