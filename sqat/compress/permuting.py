"""Puts channels inside a model in an order whose groups of M lose less to pruning; the dense model computes the same.

Where that may be is told by `sqat.compress.channels`, which orders are good by `sqat.sparsity.permutation`. The scores
are those of the criterion for the weights as they stand, so that they are gathered once more for the masks. SparseGPT's
own costs hang on the order of the columns: it is given that of wanda's scores, which serves it as well as orders by
w^2 / [H^-1]_jj did (what a layer of all-MiniLM-L6-v2 puts out for other rows errs by 6 to 18 % less).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sqat.compress.channels import Site, change, find_sites, head_count, outputs_of, reorder_
from sqat.compress.eval_mode import eval_mode
from sqat.compress.masking import Gather
from sqat.distributed import process_state
from sqat.errors import SqatError
from sqat.models.layer_selection import find_qkv
from sqat.modules.parametrize import linear
from sqat.progress import Reporter
from sqat.recipe.stages import DistillConfig, PruneConfig
from sqat.sparsity.criteria import Criterion
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.permutation import find_order, kept_score
from sqat.training.batches import Batches
from sqat.training.health import listed

ROWS = 2  # on which sites are found and outputs compared


def permute_for_(
    config: PruneConfig,
    model: nn.Module,
    patterns: Mapping[str, Pattern],
    masked: Iterable[str],
    feed: Batches,
    gather: Gather,
    seed: int,
    reporter: Reporter,
    stage: str,
) -> list[str]:
    """Permute as a prune stage asks, and return its notes; the same whenever it is done again.

    Args:
        model: plain.
        patterns: of the layers that are to be pruned.
        masked: layers that are pruned already.
        feed: of the stage.
        gather: gives what the criterion needs.
        stage: name that the reporter is told.
    """
    with eval_mode(model, seed):
        rows = next(iter(feed.stream(0)))[:ROWS]
        inputs = feed.collate(rows).to(process_state().device).inputs
    fixed = {**dict.fromkeys(masked, "it has a mask already"), **compared_apart(model, config.distill)}
    notes = permute_(model, inputs, patterns, config.criterion, gather, fixed)
    reporter.info(f"{stage}: {notes[0]}")
    return notes


def compared_apart(model: nn.Module, distill: DistillConfig | None) -> dict[str, str]:
    """The last block's q, k and v where distillation cuts heads in pieces, which a permuted head would mix."""
    pieces = distill.loss.relation_heads if distill is not None and distill.minilm_weight else None
    if distill is None or pieces is None or head_count(model) % pieces == 0:
        return {}
    return dict.fromkeys(find_qkv(model, distill.qkv), f"distillation compares it in {pieces} relation heads")


def permute_(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    criterion: Criterion,
    gather: Gather,
    fixed: Mapping[str, str] | None = None,
) -> list[str]:
    """Reorder the channels of all sites so that what reads them keeps more of the criterion's scores.

    Args:
        model: plain; its outputs for ``inputs`` are compared before and after.
        gather: gives what the criterion needs.
        fixed: layer -> why its rows and columns must stay in place.

    Returns:
        How much more is kept, and which layers keep their order and why, a line each.

    Raises:
        SqatError: the model's outputs would be others; it is as it was.
    """
    sites, left = find_sites(model, inputs, patterns, fixed)
    gathered = gather({site.consumer: site.consumer for site in sites}) if sites else {}
    before, orders, kept = outputs_of(model, inputs), [], []
    for site in sites:
        pattern, weight = patterns[site.consumer], linear(model, site.consumer).weight.detach()
        scores = criterion.score(weight, gathered.get(site.consumer)).cpu()
        orders.append(good_order(site, scores, pattern, criterion.score_name))
        better = scores[:, site.columns(orders[-1])]
        kept.append((kept_score(scores, pattern), kept_score(better, pattern), float(scores.double().sum())))
        reorder_(model, site, orders[-1])
    moved, close = change(before, outputs_of(model, inputs)), torch.finfo(next(model.parameters()).dtype).eps ** 0.5
    if not moved <= close:
        for site, order in zip(sites, orders, strict=True):
            reorder_(model, site, order.argsort(1))
        raise SqatError(f"permuted channels move the model's outputs by {moved:.1e}", "leave permute out")
    return [f"permuted the channels of {len(sites)} sites{gain(kept, criterion.score_name)}", *reasons(left)]


def gain(kept: Sequence[tuple[float, float, float]], criterion: str) -> str:
    """What layers keep of their scores before and after, in words; ``kept`` has both, and all there is."""
    if not kept:
        return ""
    before, after, whole = (sum(column) for column in zip(*kept, strict=True))
    return f": the layers that read them keep {before / whole:.1%} -> {after / whole:.1%} of their {criterion} scores"


def good_order(site: Site, scores: Tensor, pattern: Pattern, criterion: str) -> Tensor:
    """The order [heads, width] in which the consumer [R,C] keeps more within each head."""
    try:
        return torch.stack([find_order(head, pattern) for head in site.split(scores)])
    except ValueError as error:
        raise SqatError(f"{site.consumer} cannot be permuted by {criterion}: {error}") from error


def reasons(left: Mapping[str, str]) -> Iterator[str]:
    """The layers that keep the order of their inputs, a line for each reason."""
    for reason in dict.fromkeys(left.values()):
        names = [name for name, why in left.items() if why == reason]
        yield f"not permuted: the inputs of {len(names)} layers, {listed(names)}: {reason}"
