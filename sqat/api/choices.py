"""What the functions of `sqat.api` are given: names, batches, models; and what is said of those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqat.errors import SqatError
from sqat.models.layer_selection import weighted_layers
from sqat.modules.activation_quantizers import QUANTIZERS
from sqat.recipe.cross_checks import suggest

T = TypeVar("T")
Inputs = Mapping[str, Tensor]


def named(what: str, given: str | T, known: Mapping[str, T]) -> T:
    """What a name means; settings of our own, and functions, are themselves.

    Raises:
        SqatError: it is none of that, or a class made from our settings, whose own code nothing would call.
    """
    if isinstance(given, str):
        if given not in known:
            raise SqatError(f"there is no {what} {given!r}", suggest(given, known))
        return known[given]
    kinds = [type(each) for each in known.values()]
    base = next((kind for kind in kinds if isinstance(given, kind)), None)
    kind = type(given).__name__
    if base is not None and type(given) is not base:
        raise SqatError(f"{what} {kind} is made from {base.__name__}, of which only the settings are read",
                        "give a function instead")  # fmt: skip
    if base is None and not callable(given):
        raise SqatError(f"{what} is a {kind}", f"take one of {', '.join(known)}, its settings or a function")
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
