"""What the functions of `sqat.api` are given: names, batches, models; and what is said of those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqat.errors import SqatError
from sqat.models.layer_selection import weighted_layers
from sqat.modules.activation_quantizers import QUANTIZERS
from sqat.recipe.cross_checks import suggest

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
        raise SqatError(f"{what} is a {type(given).__name__}",
                        f"take one of {allowed}, its settings or a function", code="usage")  # fmt: skip
    return given


def model_inputs(batch: Inputs, device: torch.device, labels: bool = False) -> dict[str, Tensor]:
    """A batch on the model's device, mostly without its labels."""
    return {name: value.to(device) for name, value in batch.items() if labels or name != "labels"}


def check_plain(model: nn.Module) -> None:
    """Refuse a model whose weights are parametrized or whose activations are quantized."""
    changed = next((name for name, module in model.named_modules() if parametrize.is_parametrized(module)), None)
    if changed is not None or hasattr(model, QUANTIZERS):  # an attribute only while quantized
        raise SqatError(f"the model already has masks or quantizers{f', at {changed}' if changed else ''}",
                        "leave the with block, or call finish(), before")  # fmt: skip


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks of other layers or shapes than the model's."""
    layers = weighted_layers(model)
    for name, mask in masks.items():
        if name not in layers:
            raise SqatError(f"the masks name {name}, which is no layer of this model", suggest(name, list(layers)[:5]))
        if layers[name].weight.shape != mask.shape or mask.dtype != torch.bool:
            raise SqatError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}, and its weight "
                            f"{tuple(layers[name].weight.shape)}", "give the masks of this model")  # fmt: skip
