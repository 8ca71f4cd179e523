"""A linear layer with a packed 2:4 weight, and its way into a model and out. Inference only.

An int8 layer quantizes its input as its fake quantizer did, multiplies integers, and scales the sums by
scale_x * scale_w[n]. A 16-bit layer rounds input, bias and result to its type. T tokens (all leading dimensions), K
inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sqat.export.packed_folder import Scales
from sqat.quantization.fake_quant import ACTIVATION_LOW, HIGH
from sqat.sparsity.semi_structured import Order, SemiStructured, unpack
from sqat.torch_sparse.backends import Backend, Epilogue, Operand
from sqat.torch_sparse.plans import Plan, PlanKey, padded_tokens


class Operands(NamedTuple):
    """What a layer multiplies and adds on its device, computed at the first product."""

    weight: Operand
    alpha: Tensor | None
    bias: Tensor | None


class SparseLinear(nn.Module):
    """Computes y = x W^T + b with a packed W; tokens are padded to the plan's size.

    Moving the module never casts its tensors: `half()` must round neither scales nor values.

    Args:
        weight: of int8, float16 or bfloat16, [N,K].
        backend: shared by the layers of a model.
        scales: of an int8 weight; None with a 16-bit one.
        bias: [N] float, or None.

    Raises:
        ValueError: the parts do not fit each other.
    """

    values: Tensor
    metadata: Tensor
    input_scale: Tensor | None
    weight_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: SemiStructured,
        backend: Backend,
        scales: Scales | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if (weight.values.dtype == torch.int8) != (scales is not None):
            raise ValueError(f"a weight of {weight.values.dtype} needs {'no' if scales else 'both'} scales")
        for name, tensor in (("bias", bias), ("weight scale", scales.weight if scales else None)):
            if tensor is not None and tensor.shape != (self.out_features,):
                raise ValueError(f"the {name} {list(tensor.shape)} does not fit {self.out_features} outputs")
        self.order: Order = weight.order
        self.backend = backend
        self.register_buffer("values", weight.values)
        self.register_buffer("metadata", weight.metadata)
        self.register_buffer("input_scale", None if scales is None else scales.input)
        self.register_buffer("weight_scale", None if scales is None else scales.weight)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.operands: Operands | None = None
        self.register_load_state_dict_post_hook(drop_operands)  # type: ignore[no-untyped-call]

    @property
    def packed(self) -> SemiStructured:
        """The weight as it is stored."""
        return SemiStructured(self.values, self.metadata, self.order)

    @property
    def weight(self) -> Tensor:
        """A tensor without values, for models that ask for its type (T5): int8 takes inputs of any float type."""
        return torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")

    def dense(self) -> Tensor:
        """Unpack the weight [N,K] to float32."""
        weight = unpack(self.packed).float()
        return weight if self.weight_scale is None else weight * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Compute [...,N] from x [...,K], in the float type of x."""
        return self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def multiply(self, x: Tensor) -> Tensor:
        """Compute [T,N] from x [T,K]."""
        tokens = len(x)
        if not tokens:
            return x.new_empty(0, self.out_features)
        operands = self.operands = self.operands or self.prepare()
        padded = x.to(self.values.dtype) if self.input_scale is None else quantize(x, self.input_scale)
        if missing := padded_tokens(tokens) - tokens:
            padded = pad(padded, (0, 0, 0, missing))
        epilogue = self.epilogue(operands, x.dtype)
        key = PlanKey(self.out_features, self.in_features, len(padded), padded.dtype, epilogue.dtype, epilogue.name,
                      str(x.device))  # fmt: skip

        def make(key: PlanKey) -> Plan:
            return self.backend.plan(key, operands.weight, padded, epilogue)

        plan = self.backend.plans.get(key, make)
        product = self.backend.multiply(plan, operands.weight, padded, epilogue)[:tokens]
        if epilogue.name == "none" and operands.alpha is not None:
            product = product * operands.alpha  # int32 times float32 is float32
        if epilogue.name != "bias" and operands.bias is not None:
            product += operands.bias
        return product.to(x.dtype)

    def prepare(self) -> Operands:
        """Compute the weight of the backend, alpha = scale_x * scale_w [N], and the bias: float32 or 16-bit."""
        weight = self.backend.prepare(self.packed)
        if self.input_scale is None or self.weight_scale is None:
            return Operands(weight, None, None if self.bias is None else self.bias.to(self.values.dtype))
        bias = None if self.bias is None else self.bias.float()
        return Operands(weight, self.input_scale * self.weight_scale, bias)

    def epilogue(self, operands: Operands, dtype: torch.dtype) -> Epilogue:
        """Choose what the kernel does itself for a result of a type."""
        if self.input_scale is None:
            return Epilogue("none" if operands.bias is None else "bias", self.values.dtype, bias=operands.bias)
        if dtype in self.backend.scales_to:
            return Epilogue("scale", dtype, alpha=operands.alpha)
        return Epilogue("none", torch.int32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        self.operands = None
        return self

    def extra_repr(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return f"{self.in_features}, {self.out_features}, {dtype}, backend={self.backend.name}"


def drop_operands(module: nn.Module, incompatible: Any) -> None:
    """Drop the operands of tensors that were replaced."""
    assert isinstance(module, SparseLinear)
    module.operands = None


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Round to the int8 integers of `fake_quantize`, for scale = amax / 127; NaN becomes some integer."""
    scaled = x.to(torch.promote_types(x.dtype, torch.float32)) * (1 / scale)
    return scaled.round_().clamp_(ACTIVATION_LOW, HIGH).to(torch.int8)


def insert_sparse_(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Replace the layers of these names by sparse linears."""
    for name, layer in layers.items():
        replace_(model, name, layer.train(model.get_submodule(name).training))


def remove_sparse_(model: nn.Module, names: Iterable[str]) -> None:
    """Replace sparse linears by plain ones with the same weights; inputs are rounded no more."""
    for name in names:
        sparse = model.get_submodule(name)
        if not isinstance(sparse, SparseLinear):
            raise TypeError(f"{name} is a {type(sparse).__name__}, not a SparseLinear")
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        weight = sparse.dense()
        plain = nn.Linear(sparse.in_features, sparse.out_features, sparse.bias is not None, weight.device, dtype)
        with torch.no_grad():
            plain.weight.copy_(weight)
            if sparse.bias is not None:
                plain.bias.copy_(sparse.bias)
        replace_(model, name, plain.train(sparse.training))


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
