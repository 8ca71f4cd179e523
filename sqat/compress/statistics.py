"""Statistics of layers that mask criteria need: sums over their inputs, or over the gradients of their weights.

They are collected in float32, with the current masks in place and dropout off. Processes share the batches and add in
the order of the batches: the masks are bit for bit those of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqat.compress.eval_mode import eval_mode
from sqat.data.batch import Batch
from sqat.distributed import all_reduce_sum, broadcast_from, process_state
from sqat.errors import SqatError
from sqat.modules.hooks import hook_linears
from sqat.modules.parametrize import get_layer
from sqat.modules.sites import Site, align_positions
from sqat.sparsity.columns import input_windows
from sqat.sparsity.criteria import Criterion
from sqat.training.batches import Batches, seed_torch
from sqat.training.data_parallel import Loss


def collect_statistics(
    criterion: Criterion,
    model: nn.Module,
    owners: Mapping[str, str],
    loss: Loss,
    batches: Iterable[Batch],
    seed: int = 0,
) -> dict[str, Tensor]:
    """Sum the criterion's statistics over this process's batches and those of the others; {} if it needs none.

    Args:
        owners: layer -> the layer under whose name its statistics are summed, another where they share a weight.
        loss: its gradients are summed, where the criterion needs gradients.
        seed: of what the model draws; the random numbers of training go on as if nothing had been collected.

    Returns:
        Owner -> sums, as `sqat.sparsity.criteria` defines them.

    Raises:
        SqatError: no row (or gradient) reaches a layer, or a sum is not finite.
    """
    if criterion.statistics == "none":
        return {}
    state = process_state()
    with eval_mode(model, seed):
        sums = {owner: zeros_for(criterion, get_layer(model, owner)) for owner in owners.values()}
        remaining = iter(batches)
        while any(holders := processes_with_batch(batch := next(remaining, None))):
            own = sums if state.num_processes == 1 else {name: torch.zeros_like(total) for name, total in sums.items()}
            if batch is not None and criterion.needs_labels:
                add_gradients_(own, model, owners, loss, batch, criterion.statistics == "squared_gradients")
            elif batch is not None:
                add_inputs_(own, model, owners, batch, criterion.statistics == "gram")
            if own is not sums:
                add_in_order_(sums, own, holders)
    check_sums(criterion.name, sums)
    return sums


def first_batches(batches: Batches, samples: int, seed: int) -> Iterator[Batch]:
    """Yield this process's share of the first epoch's batches that hold ``samples`` rows, or of the whole epoch."""
    chosen: list[list[int]] = []
    for rows in batches.plan(0):
        if sum(map(len, chosen)) >= samples:
            break
        chosen.append(rows)
    if not chosen:
        raise SqatError("no batch of training rows is left", "check data.train and task", code="no-rows")
    state = process_state()
    for number in range(state.process_index, len(chosen), state.num_processes):
        seed_torch(seed, number)
        yield batches.collate(chosen[number]).to(state.device)


def processes_with_batch(batch: Batch | None) -> list[bool]:
    """Which processes have a batch."""
    state = process_state()
    flags = torch.zeros(state.num_processes)
    flags[state.process_index] = batch is not None
    return [bool(flag) for flag in all_reduce_sum(flags)]


def add_in_order_(sums: Mapping[str, Tensor], own: Mapping[str, Tensor], holders: list[bool]) -> None:
    """Add what each process with a batch computed, in the order of the processes."""
    for name, total in sums.items():
        for process, has_batch in enumerate(holders):
            if has_batch:
                total += broadcast_from(own[name], process)


def zeros_for(criterion: Criterion, module: nn.Linear | nn.Conv2d) -> Tensor:
    """Zeros of the shape of a statistic: [C], [C,C], or that of the weight."""
    weight = module.weight.detach()
    columns = weight[0].numel()
    shapes = {"input_squares": (columns,), "gram": (columns, columns)}
    return torch.zeros(shapes.get(criterion.statistics, weight.shape), device=weight.device)


def add_inputs_(
    sums: Mapping[str, Tensor], model: nn.Module, owners: Mapping[str, str], batch: Batch, gram: bool
) -> None:
    """Add X'X, or its diagonal, of the inputs of the layers at real (unpadded) positions."""
    attention_mask = batch.inputs.get("attention_mask")

    def hook(site: Site, x: Tensor) -> Tensor:
        inputs = input_rows(get_layer(model, site.module), site, x, attention_mask).float()
        sums[owners[site.module]].add_(inputs.T @ inputs if gram else inputs.square().sum(0))
        return x

    hooks = hook_linears(model, hook, inputs=owners)
    try:
        with torch.no_grad(), parametrize.cached():
            model(**batch.inputs)
    finally:
        hooks.remove()


def input_rows(module: nn.Linear | nn.Conv2d, site: Site, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The rows [N,C] that a layer multiplies with its weight."""
    if isinstance(module, nn.Conv2d):
        return input_windows(module, x)
    rows, real = align_positions(site, x, attention_mask)
    return rows[real]


def add_gradients_(
    sums: Mapping[str, Tensor], model: nn.Module, owners: Mapping[str, str], loss: Loss, batch: Batch, squared: bool
) -> None:
    """Add the gradients (or their squares) of the loss by the layers' masked weights, pruned ones included."""
    with parametrize.cached():  # the weight read here is the very tensor that the model multiplies
        weights = {name: get_layer(model, name).weight for name in owners}
        total = torch.stack([*loss(model, batch).values()]).sum()
        layer_gradients = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
    gradients = {owner: torch.zeros_like(statistic) for owner, statistic in sums.items()}
    for name, gradient in zip(weights, layer_gradients, strict=True):
        if gradient is not None:
            gradients[owners[name]] += gradient
    for owner, gradient in gradients.items():
        sums[owner].add_(gradient.square() if squared else gradient)


def check_sums(criterion: str, sums: Mapping[str, Tensor]) -> None:
    """Raise unless a row reached every layer, and every sum is finite."""
    hint = "exclude the layer with layers.exclude, or choose criterion magnitude"
    for name, total in sums.items():
        if not bool(total.any()):
            problem = f"criterion {criterion} cannot score {name}: no row (or gradient of the loss) reaches it"
            raise SqatError(problem, hint, code="unsupported-model")
        if not bool(total.isfinite().all()):
            problem = f"criterion {criterion} cannot score {name}: its statistics are not finite"
            raise SqatError(problem, "check the data, or choose criterion magnitude", code="non-finite")
