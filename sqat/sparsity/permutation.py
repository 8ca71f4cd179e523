"""An order of channels in which groups of M keep more of their scores under N:M (Pool & Yu, NeurIPS 2021).

Columns that matter to the same rows compete within a group. Swapping columns between groups lets more scores stay.

Shapes: R rows (outputs), C columns (inputs), P places of columns in groups, G groups of m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqat.sparsity.masks import split_groups
from sqat.sparsity.pattern import Pattern

MAX_ROUNDS = 200  # pretrained weights need about 20
COLUMNS_TRIED = 256  # in all starts: a search among few columns starts from random orders too
MIN_GAIN = 1e-6  # of what a column keeps: a smaller gain may be rounding
CHUNK = 1 << 19  # floats handled at once, to stay in a processor's cache


def sum_kept_scores(scores: Tensor, pattern: Pattern) -> float:
    """Return the sum of the scores that N:M keeps, in float64.

    Args:
        scores: [R,C], C a multiple of ``pattern.m``.
    """
    return float(split_groups(scores.double(), pattern.m, 1).topk(pattern.n, dim=2).values.sum())


def find_order(scores: Tensor, pattern: Pattern, seed: int = 0) -> Tensor:
    """Return the order of columns whose aligned groups keep the most; never less than the given order keeps.

    Args:
        scores: finite, [R,C], C a multiple of ``pattern.m``.
        seed: of the random orders from which a search among few columns starts too.

    Returns:
        int64 [C] on the CPU; ``scores[:, order]`` keeps more.

    Raises:
        ValueError: the size does not fit, or a score is not finite.
    """
    if scores.dim() != 2 or scores.shape[1] % pattern.m:
        raise ValueError(f"scores {tuple(scores.shape)} are not rows of groups of {pattern.m}")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite")
    columns = scores.detach().float().cpu().t().contiguous()
    size, generator = len(columns), torch.Generator().manual_seed(seed)
    best = torch.arange(size)
    most = sum_kept_scores(columns.t(), pattern)
    for start in range(max(1, COLUMNS_TRIED // max(size, 1)) if size > pattern.m else 0):
        first = torch.arange(size) if start == 0 else torch.randperm(size, generator=generator)
        order = swap_columns(columns, first, pattern)
        kept = sum_kept_scores(columns[order].t(), pattern)
        if kept > most:
            best, most = order, kept
    return best


def swap_columns(columns: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """Swap columns of different groups until no swap gains, and return the new order [C].

    Without column i a group surely keeps the N - 1 largest of the others in each row. Of column x in i's place it keeps
    what exceeds their N-th largest b_i. So it keeps a constant plus sum_r max(b_ir, x_r). One matrix of these sums
    holds the exact gain of every swap.

    Args:
        columns: [C,R].
        order: [C], to start with.
    """
    order, m = order.clone(), pattern.m
    sums = torch.empty(len(order), len(order))  # [P,C]: what a group keeps with a column in a place, without constants
    changed = torch.arange(len(order) // m)
    for _ in range(MAX_ROUNDS):
        places = (changed[:, None] * m + torch.arange(m)).flatten()
        members = columns[order[places]].unflatten(0, (-1, m))
        sums[places] = sum_maxima(nth_largest_of_others(members, pattern.n), columns)
        swaps = choose_swaps(sums[:, order], m)
        if not len(swaps):
            break
        order[swaps] = order[swaps.flip(1)]
        changed = (swaps // m).flatten()
    return order


def nth_largest_of_others(members: Tensor, n: int) -> Tensor:
    """Return the n-th largest of each group's other columns, which a column must exceed to be kept.

    Args:
        members: [G,m,R].

    Returns:
        [G * m, R], for the place of each column.
    """
    largest = members.topk(n + 1, dim=1).values
    last, next_one = largest[:, n - 1 : n], largest[:, n:]
    return torch.where(members >= last, next_one, last).flatten(0, 1)


def sum_maxima(left: Tensor, right: Tensor) -> Tensor:
    """Return sum_r max(left_pr, right_cr) of [P,R] and [C,R], as [P,C]."""
    sums = left.new_empty(len(left), len(right))
    block = min(256, max(1, len(right)))
    count = max(4, CHUNK // (block * max(1, right.shape[1])))
    for c in range(0, len(right), block):
        columns = right[c : c + block]
        for p in range(0, len(left), count):
            sums[p : p + count, c : c + block] = torch.maximum(left[p : p + count, None], columns).sum(2)
    return sums


def choose_swaps(sums: Tensor, m: int) -> Tensor:
    """Return the swaps that gain most, no two of which touch one group.

    Args:
        sums: [P,P], columns in their current order.

    Returns:
        [swaps, 2] places; none where no swap gains.
    """
    own, groups = sums.diagonal(), len(sums) // m
    gains = sums + sums.t() - own[:, None] - own
    best, which = gains.view(groups, m, groups, m).transpose(1, 2).flatten(2).max(2)
    pairs = (best.triu(1) > MIN_GAIN * float(own.abs().mean())).nonzero()
    order = best[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
    free, swaps = [True] * groups, []
    for g, h in pairs[order].tolist():
        if free[g] and free[h]:
            free[g] = free[h] = False
            i, j = divmod(int(which[g, h]), m)
            swaps.append((g * m + i, h * m + j))
    return torch.tensor(swaps, dtype=torch.int64).view(-1, 2)
