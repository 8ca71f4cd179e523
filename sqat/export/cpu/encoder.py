"""The encoders that target `cpu-sparse` serves, and their parts as numbers for the kernels.

A kernel does the work of several modules, and only a family's own code says which belong together: hence a table of
names. Nothing is folded that would round elsewhere than the trained model does (`sqat.modules.served_arithmetic`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sqat.errors import SqatError
from sqat.export.cpu.packing import Packed, pack
from sqat.export.quantized_model import QuantizedModel
from sqat.models.attention import attention_heads
from sqat.models.layer_selection import encoder_blocks
from sqat.models.loading import PreTrainedModel
from sqat.modules.parametrize import get_linear
from sqat.quantization.fake_quant import HIGH

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """Names of the modules of a family's encoder.

    Attributes:
        stack: the list of layers, below the base model.
        activation: the config entry with the activation function.
        has_types: tokens have types, which are embedded too.
        counts_positions: positions count the real tokens, not from 0.
    """

    stack: str
    activation: str
    query: str
    key: str
    value: str
    project: str
    first_norm: str
    widen: str
    narrow: str
    second_norm: str
    has_types: bool = True
    counts_positions: bool = False

    @property
    def attention(self) -> str:
        """The module with q, k and v, and their sites."""
        return self.query.rpartition(".")[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer."""
        return (self.query, self.key, self.value, self.project, self.widen, self.narrow)


class FusedLinear(NamedTuple):
    """Linears that read one tensor, as their kernel takes them: packed integers, scale and bias of each output."""

    weight: Packed
    scale: Floats
    bias: Floats


class Norm(NamedTuple):
    """The numbers of a layer norm."""

    gamma: Floats
    beta: Floats
    epsilon: float


@dataclass(frozen=True)
class Encoder:
    """A calibrated encoder, from `read_encoder`.

    Attributes:
        model: with plain weights, pruned ones 0.
        layers: names of its layers, in order.
        quantized: its integers, scales and amax.
    """

    model: PreTrainedModel
    family: Family
    layers: tuple[str, ...]
    quantized: QuantizedModel

    @property
    def base(self) -> str:
        """Name of the module with embeddings and layers and a dot; empty where it is the model itself."""
        return self.layers[0].removesuffix(f"{self.family.stack}.0")

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return attention_heads(self.model, f"{self.layers[0]}.{self.family.query}")

    @property
    def activation(self) -> str:
        """The kernels' name of its activation function."""
        return ACTIVATIONS[activation_of(self.model, self.family)]

    def step(self, site: str) -> float:
        """Compute the scale of an activation site in float32."""
        return float(np.float32(self.quantized.amax[site]) / np.float32(HIGH))

    def fuse(self, *names: str) -> FusedLinear:
        """Fuse linears that read one tensor."""
        linears = [get_linear(self.model, name) for name in names]
        parts = [self.quantized.weights[name] for name in names]
        scales = [scale.numpy() * np.float32(self.step(f"{name}:input"))
                  for name, (_, scale) in zip(names, parts, strict=True)]  # fmt: skip
        weight = pack(np.concatenate([integers.numpy() for integers, _ in parts]))
        return FusedLinear(weight, np.concatenate(scales), np.concatenate([bias_of(layer) for layer in linears]))

    def norm(self, name: str) -> Norm:
        """Read a layer norm."""
        norm: Any = self.model.get_submodule(name)
        return Norm(array(norm.weight), array(norm.bias), float(norm.eps))

    def table(self, name: str) -> Floats:
        """Read an embedding table."""
        embedding: Any = self.model.get_submodule(name)
        return array(embedding.weight)


def bias_of(layer: nn.Linear) -> Floats:
    """Get a linear's bias, zeros where it has none."""
    return np.zeros(layer.out_features, np.float32) if layer.bias is None else array(layer.bias)


def array(tensor: Tensor) -> Floats:
    numbers: Floats = tensor.detach().float().numpy()
    return numbers


def check_encoder(model: nn.Module) -> Family:
    """Get the family of a model that the kernels can compute.

    Raises:
        SqatError: they cannot; it names the part.
    """
    kind = str(model.config.model_type) if isinstance(model, PreTrainedModel) else type(model).__name__
    if (family := FAMILIES.get(kind)) is None:
        raise unsupported(f"encoders of type {', '.join(FAMILIES)}, and this model is of type {kind}")
    if settings_of(model).get("is_decoder"):
        raise unsupported("attention in both directions, and this model's is causal (is_decoder)")
    if (name := activation_of(model, family)) not in ACTIVATIONS:
        raise unsupported(f"the activation functions {', '.join(ACTIVATIONS)}, and this model's is {name}")
    return family


def unsupported(supported: str) -> SqatError:
    """Make the error for a model that the kernels cannot compute."""
    return SqatError(f"target cpu-sparse computes {supported}", INSTEAD, code="unsupported-model")


def activation_of(model: nn.Module, family: Family) -> str:
    """Get the config's name of the activation function between the wide linears."""
    return str(settings_of(model)[family.activation])


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Read a model's config; each family has other entries."""
    config: Any = model.config
    return dict(config.to_dict())


def read_encoder(model: nn.Module, quantized: QuantizedModel) -> Encoder:
    """Read an encoder that was calibrated with placement ``cpu``.

    Raises:
        SqatError: the kernels cannot compute it, or a linear of its layers is float.
    """
    family = check_encoder(model)
    assert isinstance(model, PreTrainedModel)
    layers = tuple(encoder_blocks(model))
    for name in (f"{layer}.{part}" for layer in layers for part in family.linears):
        if name not in quantized.weights:
            raise unsupported(f"every linear of the layers in int8, and {name} is float")
    return Encoder(model, family, layers, quantized)


INSTEAD = "calibrate with placement linear and export onnx-int8, which takes any encoder"
# Name in a config -> name in the kernels.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
BERT = Family(
    stack="encoder.layer",
    activation="hidden_act",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    project="attention.output.dense",
    first_norm="attention.output.LayerNorm",
    widen="intermediate.dense",
    narrow="output.dense",
    second_norm="output.LayerNorm",
)
DISTILBERT = Family(
    stack="transformer.layer",
    activation="activation",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    project="attention.out_lin",
    first_norm="sa_layer_norm",
    widen="ffn.lin1",
    narrow="ffn.lin2",
    second_norm="output_layer_norm",
    has_types=False,
)
ROBERTA = replace(BERT, counts_positions=True)
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "electra": BERT,
}
