"""A linear layer whose weight is packed 2:4, and how it goes into a model and out again.

An int8 layer quantizes its input as the fake quantizer it was trained with does (times 1 / scale, ties to even,
clamped to [-128,127]), multiplies integers and scales the sums by scale_x * scale_w[n]: the integers are those of the
trained model, and what differs is how floats are rounded afterwards. A 16-bit layer rounds its input, its bias and
its result to its type, as tensor cores do. Results come back in the type of the input.

Inference only: nothing has a gradient. NaN in an int8 layer's input becomes some integer, as in any int8 kernel.

Shapes: T tokens (all leading dimensions), K inputs, N outputs.
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


class Prepared(NamedTuple):
    """What a layer needs on its device beside the input, made at the first product."""

    operand: Operand
    alpha: Tensor | None
    bias: Tensor | None


class SparseLinear(nn.Module):
    """y = x W^T + b with a packed W; a plan per 16 tokens, the input padded to it and the result cut.

    Moving the module moves its tensors and never casts them: `half()` must round neither scales nor values.

    Args:
        weight: of int8, float16 or bfloat16, [N,K].
        backend: shared by the layers of a model.
        scales: of an int8 weight; None with a 16-bit one.
        bias: [N] float, or None.

    Raises:
        ValueError: parts that do not fit each other.
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
            raise ValueError(f"a weight of {weight.values.dtype} goes {'without' if scales else 'with'} scales")
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
        self.prepared: Prepared | None = None
        self.register_load_state_dict_post_hook(forget)  # type: ignore[no-untyped-call]

    @property
    def packed(self) -> SemiStructured:
        """The weight as it is stored."""
        return SemiStructured(self.values, self.metadata, self.order)

    def dense(self) -> Tensor:
        """The weight [N,K] the layer computes with, float32."""
        weight = unpack(self.packed).float()
        return weight if self.weight_scale is None else weight * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """x [...,K] of any float type to [...,N] of that type."""
        return self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def multiply(self, x: Tensor) -> Tensor:
        """[T,K] to [T,N]."""
        tokens = len(x)
        if not tokens:
            return x.new_empty(0, self.out_features)
        parts = self.prepared = self.prepared or self.prepare()
        taken = x.to(self.values.dtype) if self.input_scale is None else quantize(x, self.input_scale)
        if missing := padded_tokens(tokens) - tokens:
            taken = pad(taken, (0, 0, 0, missing))
        epilogue = self.epilogue(parts, x.dtype)
        key = PlanKey(self.out_features, self.in_features, len(taken), taken.dtype, epilogue.given, epilogue.name,
                      str(x.device))  # fmt: skip

        def make(key: PlanKey) -> Plan:
            return self.backend.plan(key, parts.operand, taken, epilogue)

        product = self.backend.multiply(self.backend.plans.get(key, make), parts.operand, taken, epilogue)[:tokens]
        if epilogue.name == "none" and parts.alpha is not None:
            product = product * parts.alpha  # int32 times float32 is float32
        if epilogue.name != "bias" and parts.bias is not None:
            product += parts.bias
        return product.to(x.dtype)

    def prepare(self) -> Prepared:
        """The operand of the backend, alpha = scale_x * scale_w [N], and the bias: float32, or of a 16-bit weight."""
        operand = self.backend.prepare(self.packed)
        if self.input_scale is None or self.weight_scale is None:
            return Prepared(operand, None, None if self.bias is None else self.bias.to(self.values.dtype))
        bias = None if self.bias is None else self.bias.float()
        return Prepared(operand, self.input_scale * self.weight_scale, bias)

    def epilogue(self, parts: Prepared, wanted: torch.dtype) -> Epilogue:
        """What the kernel does itself."""
        if self.input_scale is None:
            return Epilogue("none" if parts.bias is None else "bias", self.values.dtype, bias=parts.bias)
        if wanted in self.backend.scales_to:
            return Epilogue("scale", wanted, alpha=parts.alpha)
        return Epilogue("none", torch.int32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        self.prepared = None
        return self

    def extra_repr(self) -> str:
        kind = str(self.values.dtype).removeprefix("torch.")
        return f"{self.in_features}, {self.out_features}, {kind}, backend={self.backend.name}"


def forget(module: nn.Module, incompatible: Any) -> None:
    """Drop what was prepared from tensors that were replaced."""
    assert isinstance(module, SparseLinear)
    module.prepared = None


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """The integers that `fake_quantize` rounds to, int8, for scale = amax / 127."""
    computed = x.to(torch.promote_types(x.dtype, torch.float32)) * (1 / scale)
    return computed.round_().clamp_(ACTIVATION_LOW, HIGH).to(torch.int8)


def insert_sparse_(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Put sparse linears in the place of the model's layers of these names."""
    for name, layer in layers.items():
        replace_(model, name, layer.train(model.get_submodule(name).training))


def remove_sparse_(model: nn.Module, names: Iterable[str]) -> None:
    """Put plain linears in the place of sparse ones: the same weights, on their grid, and inputs no longer rounded."""
    for name in names:
        sparse = model.get_submodule(name)
        if not isinstance(sparse, SparseLinear):
            raise TypeError(f"{name} is a {type(sparse).__name__}, not a SparseLinear")
        kind = next((p.dtype for p in model.parameters()), torch.float32)
        weight = sparse.dense()
        plain = nn.Linear(sparse.in_features, sparse.out_features, sparse.bias is not None, weight.device, kind)
        with torch.no_grad():
            plain.weight.copy_(weight)
            if sparse.bias is not None:
                plain.bias.copy_(sparse.bias)
        replace_(model, name, plain.train(sparse.training))


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
