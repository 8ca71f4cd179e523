"""Three ways to multiply by a packed 2:4 weight, behind one interface.

    cusparselt  torch's cuSPARSELt operators: the fastest, on NVIDIA GPUs from compute capability 8.0 on
    cutlass     torch's CUTLASS operators: compute capability 8.x only, larger smallest shapes (rule C23)
    reference   any device, exact: what the other two must give, and what tests compare

A backend computes y = x W^T for x [T,K], T a multiple of 16. Only a row-major weight can be sparse, so the operators
compute y^T = W x^T: x^T is the transposed view of x, which is the one layout their int8 kernels take, and the
result comes back as [T,N]. An int8 product leaves as exact int32 sums, for cuSPARSELt left to int8 saturates; for
16-bit models cuSPARSELt multiplies each output channel by ``alpha`` itself and gives that type (rule C24).

The operators are private to torch. Their schemas are those of torch 2.8 and later; tests bind every call to them.
Left out: a bias inside int8 kernels (cuSPARSELt does not say its type there), split-K (the search's operator does
not return it), ROCm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sqat.compat import compress_2to4, multiply_2to4, multiply_2to4_cutlass, search_2to4_algorithm
from sqat.errors import SqatError
from sqat.sparsity.semi_structured import SemiStructured, unpack, unsupported_reason
from sqat.torch_sparse.plans import Plan, PlanCache, PlanKey

Operand = tuple[Tensor, ...]


class Epilogue(NamedTuple):
    """What a kernel does with its sums before it writes them.

    Attributes:
        name: ``none``, ``scale`` or ``bias``.
        given: type of the result.
        alpha: float32 [N] that ``scale`` multiplies by.
        bias: [N] of the weight's type that ``bias`` adds.
    """

    name: str
    given: torch.dtype
    alpha: Tensor | None = None
    bias: Tensor | None = None


class Backend(Protocol):
    """What a sparse linear asks of a backend; T tokens, a weight [N,K]."""

    name: ClassVar[str]
    scales_to: ClassVar[frozenset[torch.dtype]]  # types its int8 kernels write themselves, beside int32

    @property
    def plans(self) -> PlanCache:
        """Plans of the products run so far."""

    def unusable(self, device: torch.device) -> str:
        """Why it cannot run on a device; empty if it can."""

    def refuses(self, shape: tuple[int, int], kind: torch.dtype) -> str:
        """Why it cannot take a weight of a shape and type; empty if it can."""

    def prepare(self, weight: SemiStructured) -> Operand:
        """The weight as `multiply` reads it, on the weight's device."""

    def plan(self, key: PlanKey, operand: Operand, x: Tensor, epilogue: Epilogue) -> Plan:
        """Choose how to run products of a size; ``x`` is the first of them."""

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        """Product [T,N] of x [T,K], contiguous, of the epilogue's type."""


@dataclass(frozen=True)
class Reference:
    """Exact int32 sums of int8 products; 16-bit products summed in float32 and rounded once, after the bias.

    Integers are multiplied as floats, which hold them exactly: 2048 inputs have 1024 products of at most 128 x 127, so
    that no partial sum leaves float32's 2**24, in whatever order it is summed. Longer rows are summed piece by piece
    in int32. On CUDA, where float32 products may be computed with fewer bits, float64 is used.
    """

    name: ClassVar[str] = "reference"
    scales_to: ClassVar[frozenset[torch.dtype]] = frozenset()
    plans: PlanCache = field(default_factory=PlanCache)

    def unusable(self, device: torch.device) -> str:
        return ""

    def refuses(self, shape: tuple[int, int], kind: torch.dtype) -> str:
        return ""

    def prepare(self, weight: SemiStructured) -> Operand:
        dense = unpack(weight)
        return (dense.to(torch.float64 if dense.is_cuda else torch.float32),)

    def plan(self, key: PlanKey, operand: Operand, x: Tensor, epilogue: Epilogue) -> Plan:
        return Plan(key)

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        (weight,) = operand
        x = x.to(weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # which would multiply, and round, in 16 bits
            if plan.key.taken == torch.int8:
                return multiply_integers(x, weight)
            bias = None if epilogue.bias is None else epilogue.bias.to(weight.dtype)
            return functional.linear(x, weight, bias).to(epilogue.given)


EXACT = 2048


def multiply_integers(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T int32 [T,N] of integers held in floats, x [T,K] and W [N,K], in pieces that are summed exactly."""
    pieces = zip(x.split(EXACT, dim=1), weight.split(EXACT, dim=1), strict=True)
    total, *others = (functional.linear(*piece).to(torch.int32) for piece in pieces)
    for part in others:
        total += part
    return total


@dataclass(frozen=True)
class CuSparseLt:
    """torch's cuSPARSELt operators. The packed weight is unpacked on the GPU and compressed there by cuSPARSELt, whose
    form is its own secret; the kernel of each size is the fastest it finds on the first product of that size.

    Args:
        search: look for the fastest kernel, which takes long on a size's first product; else its default.
    """

    name: ClassVar[str] = "cusparselt"
    scales_to: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float16, torch.bfloat16})
    plans: PlanCache = field(default_factory=PlanCache)
    search: bool = True

    def unusable(self, device: torch.device) -> str:
        if reason := needs_gpu(device):
            return reason
        return "" if torch.backends.cusparselt.is_available() else "this build of torch has no cuSPARSELt"

    def refuses(self, shape: tuple[int, int], kind: torch.dtype) -> str:
        return unsupported_reason(self.name, shape, kind)

    def prepare(self, weight: SemiStructured) -> Operand:
        return (compress_2to4(unpack(weight).contiguous()),)

    def plan(self, key: PlanKey, operand: Operand, x: Tensor, epilogue: Epilogue) -> Plan:
        if not self.search:
            return Plan(key)
        algorithm = search_2to4_algorithm(
            operand[0],
            x.t(),
            bias=epilogue.bias,
            alpha=epilogue.alpha,
            out_dtype=given_by_int8(key, epilogue),
            transpose_result=True,
        )
        return Plan(key, algorithm)

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        return multiply_2to4(
            operand[0],
            x.t(),
            bias=epilogue.bias,
            alpha=epilogue.alpha,
            out_dtype=given_by_int8(plan.key, epilogue),
            transpose_result=True,
            alg_id=plan.algorithm,
        )


@dataclass(frozen=True)
class Cutlass:
    """torch's CUTLASS operators, which take the packed weight as it is stored in the order ``cutlass``."""

    name: ClassVar[str] = "cutlass"
    scales_to: ClassVar[frozenset[torch.dtype]] = frozenset()
    plans: PlanCache = field(default_factory=PlanCache)

    def unusable(self, device: torch.device) -> str:
        if reason := needs_gpu(device):
            return reason
        major, minor = torch.cuda.get_device_capability(device)
        return (
            ""
            if major == 8
            else f"torch's CUTLASS kernels are for compute capability 8.x, {device} has {major}.{minor}"
        )

    def refuses(self, shape: tuple[int, int], kind: torch.dtype) -> str:
        return unsupported_reason(self.name, shape, kind)

    def prepare(self, weight: SemiStructured) -> Operand:
        to_order = weight.to_order("cutlass")
        return to_order.values.contiguous(), to_order.metadata.contiguous()

    def plan(self, key: PlanKey, operand: Operand, x: Tensor, epilogue: Epilogue) -> Plan:
        return Plan(key)

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        values, metadata = operand
        given = given_by_int8(plan.key, epilogue)
        product = multiply_2to4_cutlass(values, metadata, x.t(), epilogue.bias, given)
        return product.t().contiguous()


def given_by_int8(key: PlanKey, epilogue: Epilogue) -> torch.dtype | None:
    """The type to ask an int8 kernel for; those of 16 bits give their own and refuse to be asked."""
    return epilogue.given if key.taken == torch.int8 else None


def needs_gpu(device: torch.device) -> str:
    """Why no sparse tensor cores can be used on a device; empty if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, Ampere or newer, and the model is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        "" if major >= 8 else f"it needs an Ampere GPU or newer (compute capability 8.0), {device} has {major}.{minor}"
    )


ANYWHERE = "backend reference runs anywhere"


class Choice:
    """Backends for the layers of one model on one device, each made once, so that layers of a size share plans.

    Args:
        name: a key of `BACKENDS`, or ``auto``: for each layer the first of them that can run it.

    Raises:
        SqatError: no such backend, or it cannot run on the device.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in (AUTO, *BACKENDS):
            raise SqatError(f"there is no backend {name!r}", f"one of {', '.join((AUTO, *BACKENDS))}")
        self.name = name
        made = [make() for key, make in BACKENDS.items() if name in (AUTO, key)]
        self.unusable = {backend.name: reason for backend in made if (reason := backend.unusable(device))}
        self.backends = [backend for backend in made if backend.name not in self.unusable]
        if not self.backends:
            raise SqatError(f"backend {name} cannot be used: {self.unusable[name]}", ANYWHERE)

    def of(self, layer: str, shape: tuple[int, int], kind: torch.dtype) -> Backend:
        """The backend of a layer; SqatError if the one asked for cannot take its weight."""
        reasons = []
        for backend in self.backends:
            reason = backend.refuses(shape, kind)
            if not reason:
                return backend
            reasons.append(reason)
        raise SqatError(f"{layer} cannot be run: {reasons[0]}", f"backend {AUTO} runs such layers otherwise")


AUTO = "auto"
BACKENDS: dict[str, Callable[[], Backend]] = {
    "cusparselt": CuSparseLt,
    "cutlass": Cutlass,
    "reference": Reference,
}
