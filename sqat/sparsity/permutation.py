"""An order of channels in which groups of M keep more of their scores under N:M.

What a group keeps depends on which columns share it: two columns that matter to the same rows compete, two that matter
to different rows do not. Where columns may be put in any order (`sqat.compress.channels` says where), a better
partition into groups keeps more (Pool & Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021; the search here is
another).

Columns of different groups are swapped as long as that gains. Without column i a group keeps the N - 1 largest of the
others in each row for certain, and of the column x in i's place whatever exceeds their N-th largest b_i: it keeps a
constant plus sum_r max(b_ir, x_r). So one matrix of these sums, each place against each column, holds the exact gain of
every swap. A round takes the best swap, the best among the groups it leaves untouched, and so on, and computes the rows
of the groups that changed anew. Left out: exchanges of two columns for two, which then gained next to nothing on the
weights of all-MiniLM-L6-v2. Memory: a few times C * C floats.

Shapes: R rows (outputs), C columns (inputs), P places of columns in groups, G groups of m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqat.sparsity.masks import split_groups
from sqat.sparsity.pattern import Pattern

ROUNDS = 200  # on pretrained weights about 20 settle it
STARTS = 256  # columns swapped in all: small problems are swapped from random orders too, and their best is taken
LEAST = 1e-6  # of what a column keeps: a smaller gain may be rounding
CELLS = 1 << 19  # floats handled at once, to stay in a processor's cache


def kept_score(scores: Tensor, pattern: Pattern) -> float:
    """Sum of the scores that N:M keeps, in float64.

    Args:
        scores: [R,C], C a multiple of ``pattern.m``.
    """
    return float(split_groups(scores.double(), pattern.m, 1).topk(pattern.n, dim=2).values.sum())


def find_order(scores: Tensor, pattern: Pattern, seed: int = 0) -> Tensor:
    """The order of columns whose aligned groups keep the most that was found, never less than as they are.

    Args:
        scores: finite, [R,C], C a multiple of ``pattern.m``.
        seed: of the random orders that small problems are also begun with.

    Returns:
        int64 [C] on the CPU, where all is computed: ``scores[:, order]`` keeps more.

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
    most = kept_score(columns.t(), pattern)
    for start in range(max(1, STARTS // max(size, 1)) if size > pattern.m else 0):
        begun = torch.arange(size) if start == 0 else torch.randperm(size, generator=generator)
        order = swap_columns(columns, begun, pattern)
        kept = kept_score(columns[order].t(), pattern)
        if kept > most:
            best, most = order, kept
    return best


def swap_columns(columns: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """Swap columns of different groups until no swap gains.

    Args:
        columns: [C,R].
        order: [C], to begin with.
    """
    order, m = order.clone(), pattern.m
    worth = torch.empty(len(order), len(order))  # [P,C]: what a group keeps with a column in a place, but for constants
    changed = torch.arange(len(order) // m)
    for _ in range(ROUNDS):
        places = (changed[:, None] * m + torch.arange(m)).flatten()
        members = columns[order[places]].unflatten(0, (-1, m))
        worth[places] = sums_of_larger(bars(members, pattern.n), columns)
        swaps = apart(worth[:, order], m)
        if not len(swaps):
            break
        order[swaps] = order[swaps.flip(1)]
        changed = (swaps // m).flatten()
    return order


def bars(members: Tensor, n: int) -> Tensor:
    """The n-th largest of a group's other columns, which a column must exceed to be kept.

    Args:
        members: [G,m,R].

    Returns:
        [G * m, R], for the place of each column.
    """
    largest = members.topk(n + 1, dim=1).values
    last, next_one = largest[:, n - 1 : n], largest[:, n:]
    return torch.where(members >= last, next_one, last).flatten(0, 1)


def sums_of_larger(left: Tensor, right: Tensor) -> Tensor:
    """sum_r max(left_pr, right_cr) of [P,R] and [C,R], as [P,C]."""
    sums = left.new_empty(len(left), len(right))
    block = min(256, max(1, len(right)))
    count = max(4, CELLS // (block * max(1, right.shape[1])))
    for c in range(0, len(right), block):
        columns = right[c : c + block]
        for p in range(0, len(left), count):
            sums[p : p + count, c : c + block] = torch.maximum(left[p : p + count, None], columns).sum(2)
    return sums


def apart(worth: Tensor, m: int) -> Tensor:
    """The swaps that gain most, no two of which touch one group.

    Args:
        worth: [P,P], of the columns in the order they are in.

    Returns:
        [swaps, 2] places; none where no swap gains.
    """
    own, groups = worth.diagonal(), len(worth) // m
    gains = worth + worth.t() - own[:, None] - own
    best, which = gains.view(groups, m, groups, m).transpose(1, 2).flatten(2).max(2)
    pairs = (best.triu(1) > LEAST * float(own.abs().mean())).nonzero()
    order = best[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
    free, swaps = [True] * groups, []
    for g, h in pairs[order].tolist():
        if free[g] and free[h]:
            free[g] = free[h] = False
            i, j = divmod(int(which[g, h]), m)
            swaps.append((g * m + i, h * m + j))
    return torch.tensor(swaps, dtype=torch.int64).view(-1, 2)
