"""Find channels that may change places without changing what the model computes.

A channel group is a linear (the consumer) and the linears of its block (the producers) whose outputs it reads. Groups
are found by trial: in a float64 copy, rows and columns are shuffled together. The outputs must stay, and
must change when only columns are shuffled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sqat.compress.eval_mode import eval_mode
from sqat.models.layer_selection import encoder_blocks, linear_layers
from sqat.modules.parametrize import get_linear
from sqat.sparsity.pattern import Pattern
from sqat.training.health import float_tensors

T = TypeVar("T")
SAME, DIFFERENT = 1e-9, 1e-6  # relative change of a block's outputs in float64


@dataclass(frozen=True)
class ChannelGroup:
    """The input channels of a linear, and the rows that compute them.

    Attributes:
        consumer: its inputs are [heads, repeats, width]; channels change places within ``width``, alike in all repeats.
        producers: their outputs are [parts, heads, width]; the last ``moved`` parts are these channels.
    """

    consumer: str
    producers: tuple[str, ...]
    heads: int
    repeats: int
    width: int
    parts: int = 1
    moved: int = 1

    def inside(self, block: str) -> ChannelGroup:
        """Name the layers as in the model that holds the block."""
        producers = tuple(f"{block}.{name}" for name in self.producers)
        return replace(self, consumer=f"{block}.{self.consumer}", producers=producers)

    def columns(self, order: Tensor) -> Tensor:
        """Index of the consumer's columns [C] for an order [heads, width] within each head."""
        columns = torch.arange(self.heads * self.repeats * self.width).view(self.heads, self.repeats, self.width)
        return columns.gather(2, order[:, None].expand(-1, self.repeats, -1)).flatten()

    def rows(self, order: Tensor) -> Tensor:
        """Index of a producer's rows for the same order."""
        rows = torch.arange(self.parts * self.heads * self.width).view(self.parts, self.heads, self.width)
        moved = rows[-self.moved :].gather(2, order.expand(self.moved, -1, -1))
        return torch.cat([rows[: self.parts - self.moved], moved]).flatten()

    def split_by_head(self, scores: Tensor) -> Tensor:
        """Scores [R,C] of the consumer as [heads, R * repeats, width]."""
        return scores.reshape(-1, self.heads, self.repeats, self.width).permute(1, 0, 2, 3).flatten(1, 2)


@torch.no_grad()
def reorder_(model: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Put channels in another order [heads, width]; ``order.argsort(1)`` undoes it."""
    consumer = get_linear(model, group.consumer)
    consumer.weight.copy_(consumer.weight[:, group.columns(order)])
    rows = group.rows(order)
    for name in group.producers:
        producer = get_linear(model, name)
        for parameter in (producer.weight, producer.bias):
            if parameter is not None:
                parameter.copy_(parameter[rows])


def find_channel_groups(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    fixed: Mapping[str, str] | None = None,
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Find the channel groups whose consumers are to be pruned, and why the other layers have none.

    Args:
        model: without masks or quantizers; it does not change.
        inputs: arguments of its forward, a few rows.
        patterns: of the layers that are to be pruned.
        fixed: layer -> why its rows and columns must stay in place.
    """
    fixed, heads = {**shared_parameters(model), **(fixed or {})}, head_count(model)
    groups, skipped = [], dict.fromkeys(patterns, "it is in no encoder block that ran")
    by_name: dict[str, ChannelGroup | None] = {}  # blocks are alike: later ones only check the group of the first
    for block, arguments in record_block_inputs(model, inputs, encoder_blocks(model)).items():
        consumers, fixed_here = names_inside(block, patterns), names_inside(block, fixed)
        try:
            trial = BlockTrial(model.get_submodule(block), arguments)
            for name in consumers:
                candidates = [by_name[name]] if name in by_name else trial.candidates(name, heads)
                by_name[name] = next((group for group in candidates if group and trial.accepts(group)), None)
        except (RuntimeError, TypeError) as error:
            reason = f"its block does not run in float64: {str(error).splitlines()[0]}"
            skipped |= {f"{block}.{name}": reason for name in consumers}
            continue
        for name, pattern in consumers.items():
            group = by_name[name]
            reason = why_skipped(name, group, pattern.m, fixed_here)
            if group is None or reason:
                skipped[f"{block}.{name}"] = reason
            else:
                groups.append(group.inside(block))
    grouped = {group.consumer for group in groups}
    return groups, {name: reason for name, reason in skipped.items() if name not in grouped}


def why_skipped(consumer: str, group: ChannelGroup | None, m: int, fixed: Mapping[str, str]) -> str:
    """Say why a consumer's inputs keep their order; empty where they may change it."""
    if consumer in fixed:
        return fixed[consumer]
    if group is None:
        return "no linear of its block computes them in any order"
    for name in group.producers:
        if name in fixed:
            return f"{name}: {fixed[name]}"
    width = group.width
    return f"{width} channels a head leave no choice of groups of {m}" if width % m or width <= m else ""


def names_inside(block: str, names: Mapping[str, T]) -> dict[str, T]:
    """The entries of a block, named as inside it."""
    return {name.removeprefix(f"{block}."): entry for name, entry in names.items() if name.startswith(f"{block}.")}


class BlockTrial:
    """A float64 copy of a block on the CPU, with the arguments that it gets; layers are named as inside the block."""

    def __init__(self, block: nn.Module, arguments: tuple[Any, Any]) -> None:
        self.block, self.arguments = copy.deepcopy(block).cpu().double().eval(), arguments
        self.call_order: list[str] = []
        hooks = [
            layer.register_forward_hook(lambda *_, name=name: self.call_order.append(name))
            for name, layer in linear_layers(self.block).items()
        ]
        self.outputs = self.run()
        for hook in hooks:
            hook.remove()

    def run(self) -> Tensor:
        """All outputs of the block in one vector."""
        args, keywords = to_float64(self.arguments)  # copies: a block may write into its arguments
        with torch.no_grad():
            return flatten_floats(self.block(*args, **keywords))

    def candidates(self, consumer: str, heads: int) -> Iterator[ChannelGroup]:
        """Ways in which linears that run before a consumer may compute its inputs."""
        if consumer not in self.call_order:
            return iter(())
        before = self.call_order[: self.call_order.index(consumer)]
        sizes = {name: get_linear(self.block, name).out_features for name in before}
        return candidate_groups(consumer, get_linear(self.block, consumer).in_features, sizes, heads)

    def accepts(self, group: ChannelGroup) -> bool:
        """Whether rows and columns may be shuffled together, and columns alone may not."""
        generator = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(group.width, generator=generator) for _ in range(group.heads)])
        if self.change_by(group, order) > SAME:
            return False
        return self.change_by(replace(group, producers=()), order) > DIFFERENT

    def change_by(self, group: ChannelGroup, order: Tensor) -> float:
        """Relative change of the outputs while a group is in another order."""
        reorder_(self.block, group, order)
        change = relative_change(self.outputs, self.run())
        reorder_(self.block, group, order.argsort(1))
        return change


def candidate_groups(consumer: str, width: int, sizes: Mapping[str, int], heads: int) -> Iterator[ChannelGroup]:
    """Ways in which linears of these output sizes may compute ``width`` inputs, the nearest linear first."""
    names = list(sizes)[::-1]
    by_head = heads > 1 and width % heads == 0
    pairs = [pair for pair in combinations(names, 2) if sizes[pair[0]] == sizes[pair[1]] == width]
    for count in (1, heads) if by_head else (1,):
        each = width // count
        yield from (ChannelGroup(consumer, (name,), count, 1, each) for name in names if sizes[name] == width)
        yield from (ChannelGroup(consumer, (name,), count, 1, each, 2, 2) for name in names if sizes[name] == 2 * width)
        yield from (ChannelGroup(consumer, pair, count, 1, each) for pair in pairs)
    if by_head:
        each = width // heads
        yield from (ChannelGroup(consumer, (name,), heads, 1, each, 3, 1) for name in names if sizes[name] == 3 * width)
        for name in names:  # heads that share values: grouped-query attention
            if sizes[name] < width and width % sizes[name] == 0 and sizes[name] % each == 0:
                yield ChannelGroup(consumer, (name,), sizes[name] // each, width // sizes[name], each)


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Modules with a parameter that another module holds too, each with that reason to keep its order."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    reasons: dict[str, str] = {}
    for names in owners.values():
        if len(names) > 1:
            reasons |= {name: f"shares a weight with {next(o for o in names if o != name)}" for name in names}
    return reasons


def head_count(model: nn.Module) -> int:
    """Attention heads in the model's config; 1 where it has none."""
    count = getattr(getattr(model, "config", None), "num_attention_heads", 1)  # not in configs of convolutions
    return count if isinstance(count, int) else 1


def record_block_inputs(
    model: nn.Module, inputs: Mapping[str, Tensor], blocks: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    """Run the model and record the arguments and keywords of each block's first call."""
    recorded: dict[str, tuple[Any, Any]] = {}

    def record(name: str, module: nn.Module, args: Any, keywords: Any) -> None:
        if name not in recorded:
            recorded[name] = to_float64((args, keywords))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(record, name), with_kwargs=True) for name in blocks
    ]
    try:
        run_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


def run_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """All outputs of a model in eval mode, in one vector."""
    with eval_mode(model), torch.no_grad():
        output = model(**inputs)
        return flatten_floats(output if isinstance(output, Mapping | tuple | Tensor) else vars(output))


def flatten_floats(output: object) -> Tensor:
    """All floats of an output in one float64 vector."""
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in float_tensors(output)])


def relative_change(before: Tensor, after: Tensor) -> float:
    """The largest change, as a share of the largest value."""
    return float((after - before).abs().max() / before.abs().max())


def to_float64(arguments: Any) -> Any:
    """Copy arguments of a module to the CPU, floats as float64."""
    if isinstance(arguments, Tensor):
        copied = arguments.detach().cpu().clone()
        return copied.double() if copied.is_floating_point() else copied
    if isinstance(arguments, Mapping):
        return {key: to_float64(value) for key, value in arguments.items()}
    return type(arguments)(map(to_float64, arguments)) if type(arguments) in (tuple, list) else arguments
