"""The reference against integers and float64; the GPU backends' calls against torch's own operators.

The operators have no CPU kernel, so tests give them one: what runs is the backend's real call through torch's
dispatcher, schema and all, into a plain implementation of what the operator is documented to do. It refuses layouts
and types that the GPU kernels refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sqat.errors import SqatError
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.semi_structured import SemiStructured, pack
from sqat.torch_sparse.backends import (
    BACKENDS,
    Backend,
    BackendChooser,
    CuSparseLt,
    Cutlass,
    Epilogue,
    Reference,
    gpu_problem,
)
from sqat.torch_sparse.plans import Plan, PlanKey

INTEGERS = Epilogue("none", torch.int32)
FASTEST = 7  # the number that the search finds here


def weight_of(rows: int, columns: int, kind: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = nm_mask(torch.rand(rows, columns, generator=generator), parse_pattern("2:4"))
    if kind == torch.int8:
        return (torch.randint(-127, 128, (rows, columns), generator=generator) * mask).to(kind)
    return (torch.randn(rows, columns, generator=generator) * mask).to(kind)


def inputs_of(tokens: int, columns: int, kind: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == torch.int8:
        return torch.randint(-128, 128, (tokens, columns), generator=generator).to(kind)
    return torch.randn(tokens, columns, generator=generator).to(kind)


def run(backend: Backend, packed: SemiStructured, x: Tensor, epilogue: Epilogue) -> tuple[Tensor, Plan]:
    operand = backend.prepare(packed)
    key = PlanKey(*packed.shape, len(x), x.dtype, epilogue.dtype, epilogue.name, str(x.device))
    plan = backend.plan(key, operand, x, epilogue)
    return backend.multiply(plan, operand, x, epilogue), plan


@given(st.integers(1, 3), st.sampled_from([32, 96, 2048, 2080, 4128]), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_reference_sums_integers_exactly(steps: int, columns: int, seed: int) -> None:
    weight, x = weight_of(16, columns, torch.int8, seed), inputs_of(16 * steps, columns, torch.int8, seed)
    product, _ = run(Reference(), pack(weight), x, INTEGERS)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), (x.long()[:, None] * weight.long()).sum(-1))


@pytest.mark.parametrize("columns", [2048, 8192])
@pytest.mark.parametrize("largest", [-128, -127])
def test_reference_is_exact_where_every_product_is_the_largest(columns: int, largest: int) -> None:
    """Of 127 x 127 every other sum is odd: beyond 2**24, float32 would lose it."""
    weight = torch.tensor([-127, -127, 0, 0], dtype=torch.int8).repeat(16, columns // 4)
    weight[0, 0] = 0
    product, _ = run(Reference(), pack(weight), torch.full((16, columns), largest, dtype=torch.int8), INTEGERS)
    assert product[:, 1:].unique().tolist() == [-largest * 127 * columns // 2]
    assert product[:, 0].unique().tolist() == [-largest * 127 * (columns // 2 - 1)]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_reference_rounds_16_bit_products_once(kind: torch.dtype, biased: bool) -> None:
    weight, x = weight_of(32, 64, kind), inputs_of(32, 64, kind)
    bias = inputs_of(1, 32, kind, 5)[0] if biased else None
    product, _ = run(Reference(), pack(weight), x, Epilogue("bias" if biased else "none", kind, bias=bias))
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert product.dtype == kind
    assert float((product.double() - wanted).abs().max()) <= float(wanted.abs().max()) * torch.finfo(kind).eps


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """CPU kernels for torch's sparse operators, and every call to them."""
    calls: list[dict[str, Any]] = []
    library = torch.library.Library("aten", "IMPL")

    def compress(input: Tensor) -> Tensor:
        assert input.is_contiguous()
        return input.flip(0).clone()  # not readable by anything but the product below

    def multiply(
        compressed: Tensor, dense: Tensor, bias: Any = None, alpha: Any = None, out_dtype: Any = None,
        transpose_result: bool = False, alg_id: int = 0, split_k: int = 1, split_k_mode: int = -1,
    ) -> Tensor:  # fmt: skip
        calls.append({"algorithm": alg_id, "given": out_dtype, "alpha": alpha, "bias": bias})
        integer = dense.dtype == torch.int8
        assert dense.shape[1] % 16 == 0
        assert not dense.is_contiguous()
        assert dense.t().is_contiguous(), "int8 kernels read the transposed input row by row"
        assert integer or out_dtype is None, "out_dtype is for 8-bit inputs only"
        assert out_dtype in (None, torch.int32, torch.float16, torch.bfloat16)
        assert alpha is None or (alpha.dtype == torch.float32 and alpha.shape == (len(compressed),))
        product = compressed.flip(0).double() @ dense.double()
        product = product if alpha is None else product * alpha.double()[:, None]
        product = product if bias is None else product + bias.double()[:, None]
        if integer and out_dtype is None:
            product = product.clamp(-128, 127)
        product = product.to(out_dtype or dense.dtype)
        return product.t().contiguous() if transpose_result else product

    def search(compressed: Tensor, dense: Tensor, *more: Any) -> int:
        multiply(compressed, dense, *more)
        calls.pop()
        calls.append({"search": dense.shape[1]})
        return FASTEST

    def cutlass(mat1: Tensor, mat1_meta: Tensor, mat2: Tensor, bias: Tensor | None, out_dtype: Any) -> Tensor:
        integer = mat2.dtype == torch.int8
        assert mat2.shape[1] % 16 == 0
        assert mat2.stride(0) == 1 if integer else 1 in mat2.stride()
        assert out_dtype in ((torch.int32, torch.int8) if integer else (None, mat2.dtype))
        product = sparse_semi_structured_to_dense_cutlass(mat1, mat1_meta).double() @ mat2.double()
        product = product if bias is None else product + bias.double()[:, None]
        calls.append({"given": out_dtype, "bias": bias})
        return product.to(out_dtype or mat2.dtype)

    def cutlass_mm(mat1: Tensor, mat1_meta: Tensor, mat2: Tensor, *, out_dtype: Any = None) -> Tensor:
        return cutlass(mat1, mat1_meta, mat2, None, out_dtype)

    def cutlass_addmm(
        input: Tensor, mat1: Tensor, mat1_meta: Tensor, mat2: Tensor, *, alpha: Any = 1, beta: Any = 1,
        out_dtype: Any = None,
    ) -> Tensor:  # fmt: skip
        assert input.dtype == (out_dtype or mat2.dtype)
        assert (alpha, beta) == (1, 1)
        return cutlass(mat1, mat1_meta, mat2, input, out_dtype)

    library.impl("_cslt_compress", compress, "CPU")
    library.impl("_cslt_sparse_mm", multiply, "CPU")
    library.impl("_cslt_sparse_mm_search", search, "CPU")
    library.impl("_sparse_semi_structured_mm", cutlass_mm, "CPU")
    library.impl("_sparse_semi_structured_addmm", cutlass_addmm, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("make", [CuSparseLt, Cutlass])
@pytest.mark.parametrize("order", ["rows", "cutlass"])
@pytest.mark.parametrize("tokens", [16, 48])
def test_gpu_backends_give_the_references_integers(
    make: Any, order: Any, tokens: int, emulated: list[dict[str, Any]]
) -> None:
    weight, x = weight_of(64, 128, torch.int8), inputs_of(tokens, 128, torch.int8)
    wanted, _ = run(Reference(), pack(weight), x, INTEGERS)
    product, _ = run(make(), pack(weight, order), x, INTEGERS)
    assert product.dtype == torch.int32
    assert product.is_contiguous()
    assert torch.equal(product, wanted)
    assert emulated[-1]["given"] == torch.int32, "an int8 result saturates"


@pytest.mark.parametrize("make", [CuSparseLt, Cutlass])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_gpu_backends_round_16_bit_products_as_the_reference(
    make: Any, kind: torch.dtype, biased: bool, emulated: list[dict[str, Any]]
) -> None:
    weight, x = weight_of(32, 64, kind), inputs_of(16, 64, kind)
    epilogue = Epilogue("bias", kind, bias=inputs_of(1, 32, kind, 3)[0]) if biased else Epilogue("none", kind)
    wanted, _ = run(Reference(), pack(weight), x, epilogue)
    product, _ = run(make(), pack(weight), x, epilogue)
    assert (emulated[-1]["bias"] is not None) == biased
    assert product.is_contiguous()
    torch.testing.assert_close(product, wanted, rtol=torch.finfo(kind).eps, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_cusparselt_scales_each_output_channel_itself(kind: torch.dtype, emulated: list[dict[str, Any]]) -> None:
    weight, x = weight_of(64, 128, torch.int8), inputs_of(32, 128, torch.int8)
    alpha = torch.rand(64) * 1e-3
    product, _ = run(CuSparseLt(), pack(weight), x, Epilogue("scale", kind, alpha=alpha))
    assert product.dtype == kind
    wanted = (x.double() @ weight.double().t() * alpha.double()).to(kind)
    assert torch.equal(product, wanted)
    assert emulated[-1]["alpha"] is alpha


def test_cusparselt_searches_when_a_plan_is_made_and_uses_what_it_found(emulated: list[dict[str, Any]]) -> None:
    weight, x = weight_of(32, 32, torch.int8), inputs_of(48, 32, torch.int8)
    _, plan = run(CuSparseLt(), pack(weight), x, INTEGERS)
    assert plan.algorithm == FASTEST
    assert emulated == [{"search": 48}, {"algorithm": FASTEST, "given": torch.int32, "alpha": None, "bias": None}]
    emulated.clear()
    _, plan = run(CuSparseLt(search=False), pack(weight), x, INTEGERS)
    assert [call.get("algorithm") for call in emulated] == [0]


@pytest.mark.parametrize("make", [CuSparseLt, Cutlass])
@pytest.mark.parametrize("kind", [torch.int8, torch.float16])
def test_calls_pass_torchs_own_checks_of_shapes_and_types(make: Any, kind: torch.dtype) -> None:
    """On meta tensors, through the checks torch ships for tracing; what comes out has our shape and type."""
    packed = pack(weight_of(64, 128, kind), "cutlass")
    x = inputs_of(32, 128, kind).to("meta")
    bias = None if kind == torch.int8 else torch.empty(64, dtype=kind, device="meta")
    epilogue = INTEGERS if kind == torch.int8 else Epilogue("bias", kind, bias=bias)
    compressed = torch.empty(64, 80, dtype=kind, device="meta")
    operand = (compressed,) if make is CuSparseLt else (packed.values.to("meta"), packed.metadata.to("meta"))
    plan = Plan(PlanKey(64, 128, 32, kind, epilogue.dtype, epilogue.name, "meta"))
    product = make().multiply(plan, operand, x, epilogue)
    assert (product.shape, product.dtype) == ((32, 64), epilogue.dtype)


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        ("_cslt_compress", ("input",)),
        ("_cslt_sparse_mm", ("compressed_A", "dense_B", "bias", "alpha", "out_dtype", "transpose_result", "alg_id")),
        ("_cslt_sparse_mm_search", ("compressed_A", "dense_B", "bias", "alpha", "out_dtype", "transpose_result")),
        ("_sparse_semi_structured_mm", ("mat1", "mat1_meta", "mat2", "out_dtype")),
        ("_sparse_semi_structured_addmm", ("input", "mat1", "mat1_meta", "mat2", "out_dtype")),
    ],
)
def test_schemas_still_have_what_we_pass(operator: str, names: tuple[str, ...]) -> None:
    schema = getattr(torch.ops.aten, operator).default._schema
    known = [argument.name for argument in schema.arguments]
    assert set(names) <= set(known)
    needed = [argument.name for argument in schema.arguments if not argument.has_default_value()]
    assert set(needed) <= set(names), "an argument without a default that we do not pass"


CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cusparselt: bool = True) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_without_a_gpu_the_error_says_what_runs(name: str) -> None:
    with pytest.raises(SqatError) as caught:
        BackendChooser(name, CPU)
    assert str(caught.value) == (
        f"backend {name} cannot be used: it needs an NVIDIA GPU, Ampere or newer, and the model is on cpu; "
        "backend reference runs anywhere"
    )


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_an_older_gpu_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 5))
    with pytest.raises(SqatError) as error:
        BackendChooser(name, GPU)
    assert error.value.code == "missing-hardware"
    assert BackendChooser("auto", GPU).choose("a", (64, 128), torch.int8).name == "reference"


def test_other_makers_gpus_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "NVIDIA" in gpu_problem(GPU)


def test_torch_without_cusparselt_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 6), cusparselt=False)
    with pytest.raises(SqatError) as error:
        BackendChooser("cusparselt", GPU)
    assert error.value.code == "missing-hardware"
    assert BackendChooser("auto", GPU).choose("a", (64, 128), torch.int8).name == "cutlass"


def test_cutlass_is_for_compute_capability_8_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    with pytest.raises(SqatError) as error:
        BackendChooser("cutlass", GPU)
    assert error.value.code == "missing-hardware"


def test_auto_takes_for_each_layer_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0))
    chooser = BackendChooser("auto", GPU)
    assert chooser.choose("a", (64, 128), torch.int8) is chooser.choose("b", (32, 32), torch.int8), (
        "shared, with its plans"
    )
    assert chooser.choose("a", (64, 128), torch.int8).name == "cusparselt"
    assert chooser.choose("c", (16, 128), torch.int8).name == "cutlass"
    assert chooser.choose("d", (16, 32), torch.int8).name == "reference"
    assert chooser.unusable == {}


def test_a_backend_asked_for_by_name_must_take_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0))
    with pytest.raises(SqatError) as error:
        BackendChooser("cutlass", GPU).choose("layer.1", (64, 64), torch.int8)
    assert error.value.code == "unsupported-model"


def test_on_a_cpu_auto_is_the_reference_and_says_why() -> None:
    chooser = BackendChooser("auto", CPU)
    assert chooser.choose("a", (64, 128), torch.int8).name == "reference"
    assert set(chooser.unusable) == {"cusparselt", "cutlass"}


def test_an_unknown_backend_names_the_known() -> None:
    with pytest.raises(SqatError) as error:
        BackendChooser("cublas", CPU)
    assert error.value.code == "unknown-name"
    assert [make().name for make in BACKENDS.values()] == list(BACKENDS)
