"""State dicts under plain names while masks and quantizers are on a model.

`from_pretrained` reads no names of parametrizations: it would give the pruned layers random weights. A state dict holds
``layer.weight`` with pruned weights 0 instead, and the changed model reads it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.modules.activation_quantizers import QUANTIZERS
from sqat.modules.parametrize import WeightTransform, get_layer, original_weight
from sqat.sparsity.masks import apply_mask

ORIGINAL, MASK = "parametrizations.weight.original", "parametrizations.weight.0.mask"

Hook = Callable[..., None]


def save_plain_weights_(model: nn.Module, layers: Iterable[str], *, masks: bool = False) -> list[RemovableHandle]:
    """Let the model's state dicts have plain names, until the handles are removed.

    Args:
        layers: names of all layers with a `WeightTransform`.
        masks: the state dict holds the masks too, for a run that is resumed: a pruned weight is -0.0, a kept zero
            +0.0. By default a state dict that is loaded leaves the masks as they are.
    """
    save, load = (write_masked_weight, read_masked_weight) if masks else (write_weight, read_weight)
    hooks: list[tuple[Any, Hook, Hook]] = [(model, drop_quantizers, keep_quantizers)]
    hooks += [(get_layer(model, name), save, load) for name in layers]
    handles: list[RemovableHandle] = []
    for module, after_saving, before_loading in hooks:
        handles.append(module.register_state_dict_post_hook(after_saving))
        handles.append(module.register_load_state_dict_pre_hook(before_loading))
    return handles


def remove_all(handles: Iterable[RemovableHandle]) -> None:
    """Remove the hooks; a second call does nothing."""
    for handle in handles:
        handle.remove()


def write_weight(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace the parametrization's tensors by the plain weight, pruned ones +0.0 (a state-dict hook)."""
    original, mask = original_weight(layer).detach(), mask_of(layer)
    write(state, prefix, original if mask is None else apply_mask(original, mask))


def write_masked_weight(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Do as `write_weight`; the sign of a zero says whether it is pruned."""
    original, mask = original_weight(layer).detach(), mask_of(layer)
    assert mask is not None
    write(state, prefix, torch.where(mask, original + 0.0, -0.0))  # -0.0 + 0.0 is +0.0


def write(state: dict[str, Tensor], prefix: str, weight: Tensor) -> None:
    """Put a weight into a state dict in place of the parametrization's tensors."""
    for name in [name for name in state if name.startswith(f"{prefix}parametrizations.weight.")]:
        del state[name]
    state[f"{prefix}weight"] = weight


def read_weight(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename a plain weight to the parametrization's; the mask stays (a hook before loading)."""
    mask = mask_of(layer)
    if f"{prefix}weight" in state:
        state[f"{prefix}{ORIGINAL}"] = state.pop(f"{prefix}weight")
        if mask is not None:
            state[f"{prefix}{MASK}"] = mask


def read_masked_weight(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename a plain weight to the parametrization's, and read the mask from the signs of its zeros."""
    if f"{prefix}weight" in state:
        weight = state.pop(f"{prefix}weight")
        state[f"{prefix}{ORIGINAL}"] = weight
        state[f"{prefix}{MASK}"] = ~((weight == 0) & weight.signbit())


def mask_of(layer: nn.Module) -> Tensor | None:
    """Return the mask on a layer's weight; None without one."""
    parametrizations: Any = layer.parametrizations
    transform: WeightTransform = parametrizations.weight[0]
    return transform.mask


def drop_quantizers(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Drop the quantizers' tensors from a state dict: their scales are kept elsewhere."""
    for name in [name for name in state if name.startswith(f"{prefix}{QUANTIZERS}.")]:
        del state[name]


def keep_quantizers(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Put the quantizers' own tensors into a state dict that is being loaded, so that nothing is missing."""
    quantizers = getattr(model, QUANTIZERS, None)
    if quantizers is not None:
        state |= {f"{prefix}{QUANTIZERS}.{name}": tensor for name, tensor in quantizers.state_dict().items()}
