"""Permute channels so that pruning loses less; the dense model computes the same.

`sqat.compress.channels` finds which channels may change places, `sqat.sparsity.permutation` a good order. Scores are
those of the criterion for the current weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sqat.compress.channels import (
    ChannelGroup,
    find_channel_groups,
    head_count,
    relative_change,
    reorder_,
    run_model,
)
from sqat.compress.mask_schedule import Collect
from sqat.errors import SqatError
from sqat.models.layer_selection import find_qkv
from sqat.modules.parametrize import get_linear
from sqat.sparsity.criteria import Criterion
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.permutation import find_order, sum_kept_scores
from sqat.training.health import first_names


def permute_(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    criterion: Criterion,
    collect: Collect,
    fixed: Mapping[str, str] | None = None,
) -> list[str]:
    """Reorder channels so that the layers that read them keep more of the criterion's scores.

    Args:
        model: without masks or quantizers; its outputs for ``inputs`` are compared before and after.
        patterns: of the layers that are to be pruned.
        collect: computes the criterion's statistics.
        fixed: layer -> why its rows and columns must stay in place.

    Returns:
        Notes: how much more is kept, and which layers keep their order and why.

    Raises:
        SqatError: the model's outputs change; every weight is back in its place.
    """
    groups, skipped = find_channel_groups(model, inputs, patterns, fixed)
    statistics = collect({group.consumer: group.consumer for group in groups}) if groups else {}
    before, orders, kept = run_model(model, inputs), [], []
    for group in groups:
        pattern, weight = patterns[group.consumer], get_linear(model, group.consumer).weight.detach()
        scores = criterion.score(weight, statistics.get(group.consumer)).cpu()
        order = find_group_order(group, scores, pattern, criterion.score_name)
        reordered = scores[:, group.columns(order)]
        kept.append(
            (sum_kept_scores(scores, pattern), sum_kept_scores(reordered, pattern), float(scores.double().sum()))
        )
        reorder_(model, group, order)
        orders.append(order)
    change = relative_change(before, run_model(model, inputs))
    if not change <= torch.finfo(next(model.parameters()).dtype).eps ** 0.5:
        for group, order in zip(groups, orders, strict=True):
            reorder_(model, group, order.argsort(1))
        problem = f"permuted channels change the model's outputs by {change:.1e}"
        raise SqatError(problem, "remove permute", code="unsupported-model")
    gain = describe_gain(kept, criterion.score_name)
    return [f"permuted the channels of {len(groups)} groups{gain}", *describe_skipped(skipped)]


def find_group_order(group: ChannelGroup, scores: Tensor, pattern: Pattern, criterion: str) -> Tensor:
    """Find the order [heads, width] in which the consumer [R,C] keeps more within each head."""
    try:
        return torch.stack([find_order(head, pattern) for head in group.split_by_head(scores)])
    except ValueError as error:
        problem = f"criterion {criterion} cannot permute {group.consumer}: {error}"
        raise SqatError(problem, "remove permute", code="non-finite") from error


def describe_gain(kept: Sequence[tuple[float, float, float]], criterion: str) -> str:
    """Say which share of their scores layers keep before and after; ``kept`` holds both sums and that of all scores."""
    if not kept:
        return ""
    before, after, total = (sum(column) for column in zip(*kept, strict=True))
    return f": the layers that read them keep {before / total:.1%} -> {after / total:.1%} of their {criterion} scores"


def describe_skipped(skipped: Mapping[str, str]) -> Iterator[str]:
    """Say which layers keep the order of their inputs, a line for each reason."""
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        yield f"not permuted: the inputs of {len(names)} layers, {first_names(names)}: {reason}"


def fixed_by_relation_heads(model: nn.Module, relation_heads: int | None, qkv: Sequence[str] | None) -> dict[str, str]:
    """The last block's q, k and v with a reason to stay, where distillation splits heads and so sees their order."""
    if relation_heads is None or head_count(model) % relation_heads == 0:
        return {}
    return dict.fromkeys(find_qkv(model, qkv), f"distillation compares it in {relation_heads} relation heads")
