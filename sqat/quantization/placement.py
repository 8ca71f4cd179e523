"""Placements: which activations of a model are quantized to int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PlacementName = Literal["linear", "tensorrt", "tensorrt-full", "cpu"]


@dataclass(frozen=True)
class Placement:
    """The inputs of quantized linears, inputs and outputs of quantized convolutions, and what the fields add.

    Attributes:
        attention: operands of the attention products.
        outputs: outputs of linears and operands of residual adds, but no output that an activation function reads
            (int8 in, int8 out: rule T16; rule B8).
        activation_inputs: these outputs too.
        kernels: compute as the kernels of target cpu-sparse do; softmax is then a byte without a scale.
    """

    name: PlacementName
    attention: bool = False
    outputs: bool = False
    activation_inputs: bool = False
    kernels: bool = False


PLACEMENTS: dict[str, Placement] = {
    placement.name: placement
    for placement in (
        Placement("linear"),
        Placement("tensorrt", attention=True, outputs=True),
        Placement("tensorrt-full", attention=True, outputs=True, activation_inputs=True),
        Placement("cpu", attention=True, kernels=True),
    )
}
