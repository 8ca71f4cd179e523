"""Check the arguments of `sqat.api`: names, globs, batches, models, masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sqat.errors import SqatError, suggest
from sqat.models.layer_selection import weighted_layers
from sqat.modules.activation_quantizers import QUANTIZERS
from sqat.modules.parametrize import is_ours
from sqat.recipe.stages import Layers

Inputs = Mapping[str, Tensor]


def choose_part(what: str, given: Any, parts: Sequence[type[Any]], base: type[Any]) -> Any:
    """Return the part of a name with its default settings; a part with settings, or a function, is itself.

    Args:
        what: kind of the part, for errors.
        parts: table of the kind.
        base: class of all of them.

    Raises:
        SqatError: it is none of these.
    """
    if isinstance(given, str):
        names = {part.name: part for part in parts}
        if given not in names:
            raise SqatError(f"there is no {what} {given!r}", suggest(given, names), code="unknown-name")
        return names[given]()
    if isinstance(given, type) or not (isinstance(given, base) or callable(given)):
        allowed = ", ".join(part.name for part in parts)
        got = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise SqatError(f"{what} is {got}", f"take one of {allowed}, an object with its settings or a function",
                        code="usage")  # fmt: skip
    return given


def select_layers(include: Sequence[str] | None, exclude: Sequence[str]) -> Layers:
    """Make the globs over layer names.

    Raises:
        SqatError: one text instead of a sequence of globs.
    """
    for name, globs in (("include", include), ("exclude", exclude)):
        if isinstance(globs, str):
            raise SqatError(f"{name} is the text {globs!r}", f"give a sequence: {name}=[{globs!r}]", code="usage")
    return Layers(include=None if include is None else tuple(include), exclude=tuple(exclude))


def model_inputs(batch: Inputs, device: torch.device, labels: bool = False) -> dict[str, Tensor]:
    """Copy a batch to the model's device, without its labels unless they are asked for."""
    return {name: value.to(device) for name, value in batch.items() if labels or not is_label(name)}


def is_label(name: str) -> bool:
    """Tell whether an argument of a model's forward is a label, by the names that transformers gives them."""
    return "label" in name or name in ("start_positions", "end_positions")


def check_unchanged(model: nn.Module) -> None:
    """Raise for a model that has masks or quantizers of ours; other parametrizations are the model's own."""
    changed = next((name for name, module in model.named_modules() if is_ours(module)), None)
    if changed is not None or hasattr(model, QUANTIZERS):  # an attribute only while quantized
        raise SqatError(f"the model already has masks or quantizers{f', at {changed}' if changed else ''}",
                        "leave the with block, or call finish(), before", code="usage")  # fmt: skip


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise for masks of other layers or shapes than the model's."""
    layers = weighted_layers(model)
    for name, mask in masks.items():
        if name not in layers:
            raise SqatError(f"the masks name {name}, which is no layer of this model", suggest(name, list(layers)[:5]),
                            code="model-mismatch")  # fmt: skip
        if layers[name].weight.shape != mask.shape or mask.dtype != torch.bool:
            raise SqatError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}, but its weight is "
                            f"{tuple(layers[name].weight.shape)}", "give the masks of this model",
                            code="model-mismatch")  # fmt: skip
