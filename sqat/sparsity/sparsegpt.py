"""SparseGPT (arXiv:2301.00774): choose what to prune by what its removal costs, and let the others make up for it.

The output of a layer is x W'; with H = X'X over calibration inputs x, removing weight w_j of a row and moving the
weights behind it as well as can be costs w_j^2 / [H^-1]_jj (Optimal Brain Surgeon). Columns are swept from left to
right. When the sweep reaches a group of M, the group keeps the weights that cost most; then each column's error is
spread over the columns to its right by H^-1 of what is not yet swept, the rows of one triangular factor.

How many a group keeps is the schedule's affair (its rule is asked once, with the costs before the sweep), so any
schedule works; which ones they are, the sweep says. Left out: quantization in the same sweep, and giving the error
to columns on the left that were kept.

Shapes: O counts outputs, C inputs (see `sqat.sparsity.features`), B the columns of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sqat.sparsity.features import from_columns, to_columns
from sqat.sparsity.masks import group_ranks, split_groups
from sqat.sparsity.settings import SparseGPT

BLOCK = 128  # columns swept before those to their right are brought up to date; changes the speed, not the result


def prune(
    criterion: SparseGPT,
    weight: Tensor,
    gram: Tensor,
    m: int,
    choose: Callable[[Tensor], Tensor],
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mask and the corrected weight, 0 where it is pruned; both of the shape of ``weight``.

    Args:
        weight: [out,in] or [out,in,h,w], as it is multiplied now: 0 where it is already pruned.
        gram: X'X of its inputs, [C,C].
        m: size of a group.
        choose: scores -> mask; how many it keeps of each group of ``m`` inputs is what the sweep keeps.
        kept: bool, shape of ``weight``: False where a weight must stay pruned. None where all may be kept.

    Raises:
        ValueError: the sizes do not fit, or the damped gram matrix has no inverse.
    """
    precise = torch.float32 if weight.device.type == "mps" else torch.float64
    columns = to_columns(weight.detach()).to(precise)
    factor = inverse_factor(gram.to(precise), criterion.damping)
    costs = from_columns((columns / factor.diagonal()).square(), weight.shape)
    wanted = to_columns(choose(costs if kept is None else costs.masked_fill(~kept, 0.0)))
    counts = split_groups(wanted, m, 1).sum(2, dtype=torch.uint8)
    allowed = torch.ones_like(wanted) if kept is None else to_columns(kept)
    mask, swept = sweep(columns, factor, m, counts, allowed)
    return from_columns(mask, weight.shape), from_columns(swept, weight.shape).to(weight.dtype)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular U [C,C] with U'U = H^-1, H = ``gram`` [C,C] plus ``damping`` times its mean diagonal on it.

    Row j of U times U_jj is the first row of the inverse of H[j:, j:]. A gram matrix of zeros (dead inputs) counts
    as the identity.

    Raises:
        ValueError: H is not positive definite.
    """
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
    """Choose each group's weights when it is reached and spread the error of what goes over the columns behind it.

    Args:
        weight: [O,C].
        factor: of `inverse_factor`.
        counts: uint8 [O, C / m], weights each group keeps.
        allowed: bool [O,C], False where a weight must not be kept.

    Returns:
        The mask, and the weights that stay (0 elsewhere).
    """
    weight, mask = weight.clone(), torch.zeros_like(allowed)
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
    """Sweep the B columns of one block: mask, weights and, for what lies behind it, scaled errors, [O,B] each."""
    weight, mask, errors = weight.clone(), torch.zeros_like(allowed), torch.zeros_like(weight)
    scales = factor.diagonal()
    for i in range(weight.shape[1]):
        if i % m == 0:
            group = slice(i, i + m)
            costs = (weight[:, group] / scales[group]).square().masked_fill(~allowed[:, group], -math.inf)
            mask[:, group] = group_ranks(costs, m) < counts[:, i // m, None]
        errors[:, i] = weight[:, i].masked_fill(mask[:, i], 0.0) / scales[i]
        weight[:, i:] -= errors[:, i, None] * factor[i, i:]
    return mask, weight, errors
