"""Find layers whose forward no pass calls: they have no input to quantize, and nothing that pruning them gains."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sqat.compress.eval_mode import eval_mode
from sqat.models.layer_selection import weighted_layers


def find_idle_layers(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """Return the linears and convolutions that one batch never calls (heads for other inputs, unused projections).

    Args:
        inputs: arguments of the model's forward, a small batch.
    """
    idle = set(layers := weighted_layers(model))

    def on_call(name: str, *_: object) -> None:
        idle.discard(name)

    handles = [layer.register_forward_pre_hook(partial(on_call, name)) for name, layer in layers.items()]
    try:
        with eval_mode(model), torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return idle
