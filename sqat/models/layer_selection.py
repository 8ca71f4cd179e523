"""Which linears and convolutions of a model are treated, and which make q, k and v of its last block.

Both are found by rule from the module tree: the encoder is the list of alike blocks with the most linear weights. In
a convolutional network every layer counts but the first and the last.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from sqat.errors import SqatError
from sqat.modules.parametrize import foreign_weight
from sqat.recipe.stages import Layers
from sqat.sparsity.hardware_limits import SMALLEST_SIDE, SPARSE_INPUTS, SPARSE_OUTPUTS


class LinearOfConv1D(nn.Linear):
    """A linear that stands for a Conv1D, whose weight is [in, out] in the model's own files."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear by name, in module order; a module reached twice counts once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


Layer: TypeAlias = nn.Linear | nn.Conv2d


def weighted_layers(model: nn.Module) -> dict[str, Layer]:
    """Return every linear and 2-d convolution by name, in module order; a module reached twice counts once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def is_convolutional(model: nn.Module) -> bool:
    """Say whether the model is convolutional; a transformer has at most two convolutions, for patches of images."""
    return sum(isinstance(layer, nn.Conv2d) for layer in weighted_layers(model).values()) > 2


def outer_layers(model: nn.Module) -> dict[str, str]:
    """Return the layers that are skipped unless the recipe names them, and why."""
    names = list(weighted_layers(model))
    if is_convolutional(model):
        return dict.fromkeys((names[0], names[-1]), "first or last layer of the network")
    blocks = tuple(f"{block}." for block in encoder_blocks(model))
    return {name: "outside the encoder blocks (rule B8)" for name in names if not name.startswith(blocks)}


def encoder_blocks(model: nn.Module) -> list[str]:
    """Return the names of the repeated blocks: the ModuleList of alike modules with the most linear weights.

    A block that stands several times in the list counts once. A convolutional model has none.
    """
    if is_convolutional(model):
        return []
    module_lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in module_lists if len({type(block) for block in module}) == 1]
    best = max(lists, key=lambda item: linear_weights(item[1]), default=None)
    if best is None or linear_weights(best[1]) == 0:
        raise SqatError("no encoder blocks with linear layers were found in the model",
                        f"{type(model).__name__} is not a transformer encoder that sqat can treat",
                        code="unsupported-model")  # fmt: skip
    first = {block: index for index, block in reversed(list(enumerate(best[1])))}
    return [f"{best[0]}.{index}" for index in sorted(first.values())]


def linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in linear_layers(module).values())


@dataclass(frozen=True)
class Choice:
    """Which layers a stage treats, and why it skips the others."""

    chosen: list[str]
    skipped: dict[str, str]


def choose_layers(
    model: nn.Module,
    layers: Layers,
    purpose: str,
    multiple: int = 4,
    multiples: Mapping[str, int] | None = None,
    idle: Collection[str] = (),
) -> Choice:
    """Apply the recipe's globs and rule B8, and leave alone what cannot be treated.

    A layer that cannot be treated is skipped with the reason. Only a glob of ``include`` all of whose layers cannot
    be treated is an error: such as a layer's name.

    Args:
        purpose: ``prune`` (in % 16, out % 8, in % ``multiple``) or ``quantize`` (in and out >= 16); of a convolution,
            its channels.
        multiple: M of the N:M pattern.
        multiples: of layers whose pattern has another.
        idle: layers that no forward pass calls.

    Raises:
        SqatError: a glob that matches nothing, one of ``include`` whose layers cannot be treated, or nothing left.
    """
    candidates = weighted_layers(model)
    check_globs((*(layers.include or ()), *layers.exclude), candidates)
    outer, multiples = outer_layers(model), multiples or {}
    chosen, skipped = [], {}
    for name, module in candidates.items():
        reason = unselected_reason(name, layers, outer.get(name, ""))
        reason = reason or untreatable_reason(module, purpose, multiples.get(name, multiple), name in idle)
        if reason:
            skipped[name] = reason
        else:
            chosen.append(name)
    check_includes(layers, chosen, skipped, purpose)
    if not chosen:
        raise SqatError(
            f"no layer is left to {purpose}: {next(iter(skipped.values()))}",
            "widen include, or shorten exclude",
            code="no-layer",
        )
    return Choice(chosen, skipped)


def unselected_reason(name: str, layers: Layers, outside: str) -> str:
    """Return why the recipe does not select a layer; empty where it does."""
    if any(fnmatchcase(name, glob) for glob in layers.exclude):
        return "excluded"
    if layers.include is None and outside:
        return outside
    if layers.include is not None and not any(fnmatchcase(name, glob) for glob in layers.include):
        return "not included by the recipe"
    return ""


def untreatable_reason(module: Layer, purpose: str, multiple: int, idle: bool) -> str:
    """Return why a layer cannot be treated; empty where it can."""
    if idle:
        return "its forward is never called"
    if foreign := foreign_weight(module):
        return f"its weight is computed by the model ({foreign})"
    if has_own_forward(module):
        return f"its class {type(module).__name__} computes with another weight than it stores"
    if not module.weight.is_floating_point():
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not float"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"grouped convolution ({module.groups} groups): no sparse kernel takes it"
    outputs, inputs = module.weight.shape[:2]
    if purpose == "prune" and (outputs % SPARSE_OUTPUTS or inputs % SPARSE_INPUTS or inputs % multiple):
        return (
            f"[{outputs}, {inputs}] is not a multiple of [{SPARSE_OUTPUTS}, {max(SPARSE_INPUTS, multiple)}] (rule B8)"
        )
    if purpose == "quantize" and min(outputs, inputs) < SMALLEST_SIDE:
        return f"[{outputs}, {inputs}] is smaller than {SMALLEST_SIDE} (rule B8)"
    return ""


def has_own_forward(module: Layer) -> bool:
    """Say whether a subclass overrides what torch computes, as convolutions with standardized weights do."""
    base = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    own = type(module)
    return any(getattr(own, name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward"))


def check_includes(layers: Layers, chosen: Sequence[str], skipped: Mapping[str, str], purpose: str) -> None:
    """Refuse a glob of ``include`` that selects layers, of which none can be treated."""
    for glob in layers.include or ():
        selected = [name for name in (*chosen, *skipped) if fnmatchcase(name, glob) and skipped.get(name) != "excluded"]
        if selected and not set(selected) & set(chosen):
            raise SqatError(f"layers.include: {glob!r} selects no layer to {purpose}; {selected[0]} cannot be: "
                            f"{skipped[selected[0]]}", "take it out of include", code="no-layer")  # fmt: skip


def check_globs(globs: Iterable[str], layers: Mapping[str, Layer]) -> None:
    """Refuse a glob that matches no layer."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in layers):
            some = ", ".join(list(layers)[:3])
            raise SqatError(
                f"layers: {glob!r} matches no layer",
                f"the model has {some}, ... ({len(layers)} in all)",
                code="no-layer",
            )


QKV_NAME = re.compile(r"^(?:w_?)?(q|k|v|query|key|value)(?:_?(?:proj|projection|lin|linear|layer))?$", re.IGNORECASE)


FUSED_NAME = re.compile(r"^(?:w_?)?qkv(?:_?(?:proj|projection|lin|linear|layer))?$", re.IGNORECASE)


def is_fused_conv1d(name: str, layer: nn.Linear) -> bool:
    """Say whether a layer is GPT-2's fused q, k and v; in other families the name means interleaved heads."""
    return isinstance(layer, LinearOfConv1D) and name.endswith(".c_attn")


def is_causal(model: nn.Module, layer: str) -> bool:
    """Say whether the attention of a q, k or v linear reads only earlier tokens, as transformers marks it."""
    return bool(getattr(model.get_submodule(layer.rpartition(".")[0]), "is_causal", False))


def find_qkv(model: nn.Module, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the linears that make q, k and v of the last block: three, or one fused.

    They are called q/k/v or query/key/value with an ordinary suffix (`q_lin`, `key_proj`, `Wqkv` fused).

    Args:
        names: the recipe's choice, which overrides the rule.
    """
    found = linear_layers(model)
    if names is not None:
        unknown = [name for name in names if name not in found]
        if unknown or len(names) not in (1, 3):
            raise SqatError(
                f"qkv names {unknown[0] if unknown else len(names)}",
                "give three linear layers or one fused",
                code="no-layer",
            )
        return tuple(names)
    blocks = encoder_blocks(model)
    if not blocks:
        raise SqatError("MiniLM distillation needs attention, and sqat treats the model as a network of convolutions",
                        "train on labels or outputs (in a recipe, distill: {minilm_weight: 0})",
                        code="unsupported-model")  # fmt: skip
    last = f"{blocks[-1]}."
    inside = [name for name in found if name.startswith(last)]
    roles: dict[str, list[str]] = {"q": [], "k": [], "v": []}
    for name in inside:
        if match := QKV_NAME.match(name.rsplit(".", 1)[1]):
            roles[match[1][0].lower()].append(name)
    fused = [name for name in inside if FUSED_NAME.match(name.rsplit(".", 1)[1]) or is_fused_conv1d(name, found[name])]
    if all(len(matches) == 1 for matches in roles.values()):
        return tuple(matches[0] for matches in roles.values())
    if len(fused) == 1 and not any(roles.values()):
        return (fused[0],)
    raise SqatError("which linears make q, k and v of the last block cannot be told from their names",
                    "name three linears (or one fused) as qkv (in a recipe, distill.qkv), or distil outputs only "
                    f"(distill: {{minilm_weight: 0}}); it has: {', '.join(inside)}",
                    code="unsupported-model")  # fmt: skip
