"""Three ways to multiply by a packed 2:4 weight, behind one interface.

    cusparselt  torch's cuSPARSELt operators: the fastest, on NVIDIA GPUs from compute capability 8.0 on
    cutlass     torch's CUTLASS operators: compute capability 8.x only (rule C23)
    reference   any device, exact

Only a row-major weight can be sparse, so the operators compute y^T = W x^T. They are private to torch: schemas of 2.8
and later.
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
        dtype: type of the result.
        alpha: float32 [N] that ``scale`` multiplies by.
        bias: [N] of the weight's type that ``bias`` adds.
    """

    name: str
    dtype: torch.dtype
    alpha: Tensor | None = None
    bias: Tensor | None = None


class Backend(Protocol):
    """What a sparse linear needs of a backend; x has T tokens, T a multiple of 16, and a weight is [N,K]."""

    name: ClassVar[str]
    scales_to: ClassVar[frozenset[torch.dtype]]  # types that its int8 kernels write themselves, beside int32

    @property
    def plans(self) -> PlanCache:
        """Cache of the plans of recent products."""

    def device_problem(self, device: torch.device) -> str:
        """Say why it cannot run on a device; empty if it can."""

    def weight_problem(self, shape: tuple[int, int], dtype: torch.dtype) -> str:
        """Say why it cannot take a weight of a shape and type; empty if it can."""

    def prepare(self, weight: SemiStructured) -> Operand:
        """Convert the weight to the form that `multiply` reads, on its device."""

    def plan(self, key: PlanKey, operand: Operand, x: Tensor, epilogue: Epilogue) -> Plan:
        """Choose how to run products of a size; ``x`` is the first of them."""

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        """Compute x W^T [T,N] of x [T,K], contiguous, in the epilogue's type."""


@dataclass(frozen=True)
class Reference:
    """Exact int32 sums of int8 products; 16-bit products are summed in float32 and rounded once, after the bias."""

    name: ClassVar[str] = "reference"
    scales_to: ClassVar[frozenset[torch.dtype]] = frozenset()
    plans: PlanCache = field(default_factory=PlanCache)

    def device_problem(self, device: torch.device) -> str:
        return ""

    def weight_problem(self, shape: tuple[int, int], dtype: torch.dtype) -> str:
        return ""

    def prepare(self, weight: SemiStructured) -> Operand:
        dense = unpack(weight)
        # CUDA may compute float32 products with fewer bits
        return (dense.to(torch.float64 if dense.is_cuda else torch.float32),)

    def plan(self, key: PlanKey, operand: Operand, x: Tensor, epilogue: Epilogue) -> Plan:
        return Plan(key)

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        (weight,) = operand
        x = x.to(weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # which would multiply, and round, in 16 bits
            if plan.key.input_dtype == torch.int8:
                return multiply_integers(x, weight)
            bias = None if epilogue.bias is None else epilogue.bias.to(weight.dtype)
            return functional.linear(x, weight, bias).to(epilogue.dtype)


EXACT = 2048  # inputs with 1024 products of at most 128 x 127: no partial sum leaves float32's 2**24


def multiply_integers(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T int32 [T,N] of integers held in floats, x [T,K] and W [N,K], in parts with exact sums."""
    parts = zip(x.split(EXACT, dim=1), weight.split(EXACT, dim=1), strict=True)
    total, *others = (functional.linear(*part).to(torch.int32) for part in parts)
    for other in others:
        total += other
    return total


@dataclass(frozen=True)
class CuSparseLt:
    """torch's cuSPARSELt operators, which compress the dense weight on the GPU into a form of their own.

    Args:
        search: search the fastest kernel on a size's first product, which takes long; else use the default.
    """

    name: ClassVar[str] = "cusparselt"
    scales_to: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float16, torch.bfloat16})
    plans: PlanCache = field(default_factory=PlanCache)
    search: bool = True

    def device_problem(self, device: torch.device) -> str:
        if problem := gpu_problem(device):
            return problem
        return "" if torch.backends.cusparselt.is_available() else "this build of torch has no cuSPARSELt"

    def weight_problem(self, shape: tuple[int, int], dtype: torch.dtype) -> str:
        return unsupported_reason(self.name, shape, dtype)

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
            out_dtype=int8_output_type(key, epilogue),
            transpose_result=True,
        )
        return Plan(key, algorithm)

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        return multiply_2to4(
            operand[0],
            x.t(),
            bias=epilogue.bias,
            alpha=epilogue.alpha,
            out_dtype=int8_output_type(plan.key, epilogue),
            transpose_result=True,
            alg_id=plan.algorithm,
        )


@dataclass(frozen=True)
class Cutlass:
    """torch's CUTLASS operators, which take a packed weight in the order ``cutlass`` as it is."""

    name: ClassVar[str] = "cutlass"
    scales_to: ClassVar[frozenset[torch.dtype]] = frozenset()
    plans: PlanCache = field(default_factory=PlanCache)

    def device_problem(self, device: torch.device) -> str:
        if problem := gpu_problem(device):
            return problem
        major, minor = torch.cuda.get_device_capability(device)
        return (
            ""
            if major == 8
            else f"torch's CUTLASS kernels are for compute capability 8.x, {device} has {major}.{minor}"
        )

    def weight_problem(self, shape: tuple[int, int], dtype: torch.dtype) -> str:
        return unsupported_reason(self.name, shape, dtype)

    def prepare(self, weight: SemiStructured) -> Operand:
        to_order = weight.to_order("cutlass")
        return to_order.values.contiguous(), to_order.metadata.contiguous()

    def plan(self, key: PlanKey, operand: Operand, x: Tensor, epilogue: Epilogue) -> Plan:
        return Plan(key)

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        values, metadata = operand
        dtype = int8_output_type(plan.key, epilogue)
        product = multiply_2to4_cutlass(values, metadata, x.t(), epilogue.bias, dtype)
        return product.t().contiguous()


def int8_output_type(key: PlanKey, epilogue: Epilogue) -> torch.dtype | None:
    """Choose the output type of an int8 kernel; 16-bit kernels take none."""
    return epilogue.dtype if key.input_dtype == torch.int8 else None


def gpu_problem(device: torch.device) -> str:
    """Say why a device has no usable sparse tensor cores; empty if it has."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, Ampere or newer, and the model is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        "" if major >= 8 else f"it needs an Ampere GPU or newer (compute capability 8.0), {device} has {major}.{minor}"
    )


ANYWHERE = "backend reference runs anywhere"


class BackendChooser:
    """Chooses backends for the layers of one model on one device; layers of a size share plans.

    Args:
        name: a key of `BACKENDS`, or ``auto``: for each layer the first of them that can run it.

    Raises:
        SqatError: the backend does not exist, or cannot run on the device.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in (AUTO, *BACKENDS):
            raise SqatError(f"no backend {name!r}", f"allowed: {', '.join((AUTO, *BACKENDS))}", code="unknown-name")
        self.name = name
        backends = [create() for key, create in BACKENDS.items() if name in (AUTO, key)]
        self.unusable = {backend.name: problem for backend in backends if (problem := backend.device_problem(device))}
        self.backends = [backend for backend in backends if backend.name not in self.unusable]
        if not self.backends:
            raise SqatError(f"backend {name} cannot be used: {self.unusable[name]}", ANYWHERE, code="missing-hardware")

    def choose(self, layer: str, shape: tuple[int, int], dtype: torch.dtype) -> Backend:
        """Choose the first backend that can take a layer's weight.

        Raises:
            SqatError: none can.
        """
        problems = []
        for backend in self.backends:
            problem = backend.weight_problem(shape, dtype)
            if not problem:
                return backend
            problems.append(problem)
        raise SqatError(f"{layer} cannot be run: {problems[0]}", f"backend {AUTO} runs such layers by another backend",
                        code="unsupported-model")  # fmt: skip


AUTO = "auto"
BACKENDS: dict[str, Callable[[], Backend]] = {
    "cusparselt": CuSparseLt,
    "cutlass": Cutlass,
    "reference": Reference,
}
