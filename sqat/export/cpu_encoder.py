"""Encoders that the target `cpu-sparse` serves: which they are, and their parts as numbers for the kernels.

What: `check_encoder` refuses a model that the kernels do not compute and names the part; `Encoder` reads a calibrated
one: integers and scales of its linears, its norms, and the steps of its activations.

Why a table of names: a kernel does the work of several modules (q, k and v; a linear with the residual add and the
norm behind it), and which belong together only the family's own code says. A linear's output is ``sum * scale + bias``
with scale = input step * weight step, as `sqat.modules.served_arithmetic` has it: nothing is folded that would round
in another place than the trained model does. Left out: layers of which a linear stays float, relative and rotary
positions, decoders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sqat.errors import SqatError
from sqat.export.cpu_packing import Packed, pack
from sqat.export.quantized_model import QuantizedModel
from sqat.models.attention import attention_heads
from sqat.models.layer_selection import encoder_blocks
from sqat.models.loading import PreTrainedModel
from sqat.modules.parametrize import linear
from sqat.quantization.fake_quant import HIGH

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """Names of the parts that a family's encoder is made of.

    Attributes:
        stack: the list of layers, below the base model.
        activation: the config's entry that names the activation function.
        typed: tokens have types, which are embedded too.
        counted: positions are counted over the real tokens, not from 0.
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
    typed: bool = True
    counted: bool = False

    @property
    def attention(self) -> str:
        """The module that has q, k and v, and their sites."""
        return self.query.rpartition(".")[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer."""
        return (self.query, self.key, self.value, self.project, self.widen, self.narrow)


class Product(NamedTuple):
    """A linear as its kernel takes it: packed integers, a scale and a bias for each output."""

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
        """Name of the module with embeddings and layers, with a dot behind it; empty where it is the model itself."""
        return self.layers[0].removesuffix(f"{self.family.stack}.0")

    @property
    def heads(self) -> int:
        """Heads of its attention."""
        return attention_heads(self.model)

    @property
    def activation(self) -> str:
        """The kernels' name of its activation function."""
        return ACTIVATIONS[activation_of(self.model, self.family)]

    def step(self, site: str) -> float:
        """Scale of a site as float32 has it."""
        return float(np.float32(self.quantized.amax[site]) / np.float32(HIGH))

    def product(self, *names: str) -> Product:
        """Linears that read one tensor, as one."""
        linears = [linear(self.model, name) for name in names]
        parts = [self.quantized.weights[name] for name in names]
        scales = [scale.numpy() * np.float32(self.step(f"{name}:input"))
                  for name, (_, scale) in zip(names, parts, strict=True)]  # fmt: skip
        weight = pack(np.concatenate([integers.numpy() for integers, _ in parts]))
        return Product(weight, np.concatenate(scales), np.concatenate([bias_of(layer) for layer in linears]))

    def norm(self, name: str) -> Norm:
        """The layer norm of a name."""
        found: Any = self.model.get_submodule(name)
        return Norm(array(found.weight), array(found.bias), float(found.eps))

    def table(self, name: str) -> Floats:
        """The embedding table of a name."""
        found: Any = self.model.get_submodule(name)
        return array(found.weight)


def bias_of(layer: nn.Linear) -> Floats:
    """A linear's bias, zeros where it has none."""
    return np.zeros(layer.out_features, np.float32) if layer.bias is None else array(layer.bias)


def array(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().float().numpy()
    return found


def check_encoder(model: nn.Module) -> Family:
    """The family of a model that the kernels compute.

    Raises:
        SqatError: they do not; it names the part.
    """
    kind = str(model.config.model_type) if isinstance(model, PreTrainedModel) else type(model).__name__
    if (family := FAMILIES.get(kind)) is None:
        raise refusal(f"encoders of type {', '.join(FAMILIES)}, and this model is of type {kind}")
    if settings_of(model).get("is_decoder"):
        raise refusal("attention in both directions, and this model's is causal (is_decoder)")
    if (name := activation_of(model, family)) not in ACTIVATIONS:
        raise refusal(f"the activation functions {', '.join(ACTIVATIONS)}, and this model's is {name}")
    return family


def refusal(text: str) -> SqatError:
    return SqatError(f"target cpu-sparse computes {text}", INSTEAD)


def activation_of(model: nn.Module, family: Family) -> str:
    """The config's name of the activation function between the wide linears."""
    return str(settings_of(model)[family.activation])


def settings_of(model: nn.Module) -> dict[str, Any]:
    """A model's config, which has other entries in each family."""
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
            raise refusal(f"every linear of the layers in int8, and {name} is float")
    return Encoder(model, family, layers, quantized)


INSTEAD = "calibrate with placement linear and export onnx-int8, which takes any encoder"
# As the configs name them, and the kernels.
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
    typed=False,
)
ROBERTA = replace(BERT, counted=True)
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "electra": BERT,
}
