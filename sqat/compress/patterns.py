"""Which N:M pattern each layer of a prune stage gets: the recipe's globs in order, else the stage's own pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from sqat.errors import SqatError
from sqat.models.layer_selection import Choice, choose_layers, weighted_layers
from sqat.modules.parametrize import layer
from sqat.recipe.stages import PruneConfig
from sqat.sparsity.pattern import Pattern, parse_pattern

DENSE = "dense"


def choose_patterns(model: nn.Module, config: PruneConfig) -> tuple[dict[str, Pattern], dict[str, str]]:
    """The pattern of every layer that is pruned, and why the others are left alone.

    Raises:
        SqatError: a glob that decides nothing, a weight with two patterns, or no layer left to prune.
    """
    globs = {name: first_match(name, config.patterns) for name in weighted_layers(model)}
    texts = {name: config.patterns[glob] for name, glob in globs.items() if glob is not None}
    multiples = {name: parse_pattern(text).m for name, text in texts.items() if text != DENSE}
    choice = choose_layers(model, config.layers, "prune", parse_pattern(config.pattern).m, multiples)
    check_deciding(config.patterns, globs, choice)
    pruned = {name: texts.get(name, config.pattern) for name in choice.chosen}
    kept = {name: f"dense by the recipe's pattern {globs[name]!r}" for name, text in pruned.items() if text == DENSE}
    if len(kept) == len(pruned):
        raise SqatError("patterns: every layer is dense, so nothing is pruned", "leave a layer to pattern")
    chosen = {name: parse_pattern(text) for name, text in pruned.items() if text != DENSE}
    check_shared(model, pruned)
    return chosen, {**choice.left, **kept}


def check_shared(model: nn.Module, texts: Mapping[str, str]) -> None:
    """A weight that several layers share has one pattern."""
    first: dict[int, str] = {}
    for name, text in texts.items():
        other = first.setdefault(id(layer(model, name).weight), name)
        if texts[other] != text:
            raise SqatError(f"patterns: {other} and {name} share one weight, which cannot be {texts[other]} and {text}",
                            "give both one pattern")  # fmt: skip


def first_match(name: str, globs: Iterable[str]) -> str | None:
    """The first glob that matches a layer's name."""
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)


def check_deciding(globs: Iterable[str], matches: Mapping[str, str | None], choice: Choice) -> None:
    """A glob that no layer follows is an error: none has such a name, an earlier glob came first, or it is left."""
    for glob in globs:
        named = [name for name in matches if fnmatchcase(name, glob)]
        first = [name for name in named if matches[name] == glob]
        if not named:
            some = ", ".join(list(matches)[:3])
            raise SqatError(f"patterns: {glob!r} matches no layer",
                            f"the model has {some}, ... ({len(matches)} in all)")  # fmt: skip
        if not first:
            raise SqatError(f"patterns: {glob!r} comes too late: an earlier glob matches each of its layers",
                            "put it before that one, or leave it out")  # fmt: skip
        if not set(first) & set(choice.chosen):
            raise SqatError(f"patterns: {glob!r} matches only layers that are not pruned: "
                            f"{first[0]} is left alone: {choice.left[first[0]]}", "see layers.include")  # fmt: skip
