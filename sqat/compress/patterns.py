"""Choose the N:M pattern of each layer: that of the first glob that matches its name, else the default."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from sqat.errors import SqatError
from sqat.models.layer_selection import Choice, choose_layers, weighted_layers
from sqat.modules.parametrize import get_layer
from sqat.recipe.stages import Layers
from sqat.sparsity.pattern import Pattern, parse_pattern

DENSE = "dense"


def choose_patterns(
    model: nn.Module,
    layers: Layers,
    default: str,
    by_glob: Mapping[str, str] | None = None,
    idle: Collection[str] = (),
) -> tuple[dict[str, Pattern], dict[str, str]]:
    """Choose the pattern of every layer that is pruned, and say why the others are skipped.

    Args:
        layers: globs of the layers that may be pruned.
        default: ``N:M``.
        by_glob: glob over layer names -> ``N:M`` or ``dense``.
        idle: layers that no forward pass calls.

    Raises:
        SqatError: a glob that no layer follows, a weight with two patterns, or no layer to prune.
    """
    by_glob = by_glob or {}
    globs = {name: first_match(name, by_glob) for name in weighted_layers(model)}
    texts = {name: by_glob[glob] for name, glob in globs.items() if glob is not None}
    multiples = {name: parse_pattern(text).m for name, text in texts.items() if text != DENSE}
    choice = choose_layers(model, layers, "prune", parse_pattern(default).m, multiples, idle)
    check_globs_followed(by_glob, globs, choice)
    pruned = {name: texts.get(name, default) for name in choice.chosen}
    dense = {name: f"dense by the recipe's pattern {globs[name]!r}" for name, text in pruned.items() if text == DENSE}
    if len(dense) == len(pruned):
        raise SqatError("patterns: every layer is dense, so no layer is pruned", "give a layer a pattern N:M",
                        code="no-layer")  # fmt: skip
    check_shared_weights(model, pruned)
    patterns = {name: parse_pattern(text) for name, text in pruned.items() if text != DENSE}
    return patterns, {**choice.skipped, **dense}


def check_shared_weights(model: nn.Module, texts: Mapping[str, str]) -> None:
    """Raise where layers that share a weight have two patterns."""
    first: dict[int, str] = {}
    for name, text in texts.items():
        other = first.setdefault(id(get_layer(model, name).weight), name)
        if texts[other] != text:
            problem = f"patterns: {other} and {name} share one weight, which cannot be both {texts[other]} and {text}"
            raise SqatError(problem, "give both one pattern", code="recipe-conflict")


def first_match(name: str, globs: Iterable[str]) -> str | None:
    """The first glob that matches a layer's name."""
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)


def check_globs_followed(globs: Iterable[str], matches: Mapping[str, str | None], choice: Choice) -> None:
    """Raise for a glob that no layer follows: it matches none, an earlier one matches first, or they are skipped."""
    for glob in globs:
        matched = [name for name in matches if fnmatchcase(name, glob)]
        followers = [name for name in matched if matches[name] == glob]
        if not matched:
            some = ", ".join(list(matches)[:3])
            raise SqatError(f"patterns: {glob!r} matches no layer",
                            f"the model has {some}, ... ({len(matches)} in all)", code="no-layer")  # fmt: skip
        if not followers:
            raise SqatError(f"patterns: {glob!r} comes too late: an earlier glob matches each of its layers",
                            "put it before that one, or remove it", code="no-layer")  # fmt: skip
        if not set(followers) & set(choice.chosen):
            first = followers[0]
            raise SqatError(f"patterns: {glob!r} matches only layers that are not pruned; {first} is skipped: "
                            f"{choice.skipped[first]}", "see layers.include", code="no-layer")  # fmt: skip
