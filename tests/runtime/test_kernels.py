"""The compiled kernels of training: the bits of every instruction set, and of torch's chains that they replace."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from sqat import runtime
from sqat.errors import SqatError
from sqat.quantization.fake_quant import fake_quantize, fake_quantize_weight
from sqat.quantization.histogram import Histogram
from sqat.runtime import kernels
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import Pattern
from tests.runtime.kernel_oracle import SIZES, check
from tests.runtime.nodes import available, needs_library

AMAX = torch.tensor(1.5)
Function = Callable[[Tensor], Tensor]


@needs_library
@pytest.mark.parametrize("name", available())
def test_every_instruction_set_agrees_with_numpy(name: str, tmp_path: Path) -> None:
    own = tmp_path / f"{name}.so"  # a copy, for a library chooses once
    shutil.copy(runtime.library(), own)
    with patch.dict(os.environ, {"SQAT_RUNTIME_ISA": name}):
        assert check(own) == len(SIZES)


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's chains do it all."""
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8)


def with_gradient(function: Function, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.backward(grad)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return y.detach(), leaf.grad


MASK = values((48, 40), 1) > 0
CHAINS: dict[str, Function] = {
    "activation": lambda x: fake_quantize(x, AMAX),
    "activation from -127": lambda x: fake_quantize(x, AMAX, -127),
    "mask": lambda x: apply_mask(x, MASK),
    "mask, straight": lambda x: apply_mask(x, MASK, straight_through=True),
    "weight": lambda x: fake_quantize_weight(x, None),
    "masked weight": lambda x: fake_quantize_weight(x, MASK),
}


@needs_library
@pytest.mark.parametrize("name", CHAINS)
def test_torch_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = values((48, 40)), values((48, 40), 2)
    x[0] = 0.0
    x[1, ::2] = -0.0
    x[2] = torch.arange(40) * AMAX / 127 / 2  # halves
    assert kernels.is_supported(x)
    y, passed = with_gradient(CHAINS[name], x, grad)
    without_kernels(monkeypatch)
    assert not kernels.is_supported(x)
    want, gradient = with_gradient(CHAINS[name], x, grad)
    assert torch.equal(bits(y), bits(want))
    assert torch.equal(bits(passed), bits(gradient))


@needs_library
def test_a_nan_is_not_lost() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert kernels.is_supported(x)
    assert fake_quantize(x, AMAX).isnan().tolist() == [False, True, False]


@needs_library
@pytest.mark.parametrize(("shape", "dim"), [((6, 20), 1), ((3, 8, 2, 2), 1), ((8, 5), 0)])
def test_masks_are_the_same(shape: tuple[int, ...], dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    for n in (1, 2, 3):
        with monkeypatch.context() as patched:
            mask = nm_mask(scores, Pattern(n, 4), dim)
            without_kernels(patched)
            assert torch.equal(mask, nm_mask(scores, Pattern(n, 4), dim))


@needs_library
def test_histograms_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [values((7, 11, 13), seed) * 10.0**seed for seed in range(4)]
    keep = values((7, 11), 9) > 0
    with monkeypatch.context() as patched:
        ours, theirs = Histogram(), Histogram()
        for batch in batches:
            ours.observe(batch, keep)
        without_kernels(patched)
        for batch in batches:
            theirs.observe(batch, keep)
    assert ours.total == 4 * 13 * int(keep.sum())
    assert torch.equal(ours.counts, theirs.counts)
    assert (ours.exponent, ours.max_abs) == (theirs.exponent, theirs.max_abs)


@needs_library
def test_the_backward_pass_keeps_a_byte_a_value() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fake_quantize(values((8, 8)).requires_grad_(), AMAX)
    assert [(x.dtype, x.numel()) for x in kept] == [(torch.bool, 64)]


@needs_library
@pytest.mark.parametrize("name", ["activation", "mask", "masked weight"])
def test_a_gradient_of_a_gradient_is_right(name: str) -> None:
    """Kernels record nothing: where a graph of the backward pass is needed, torch runs."""
    x = values((48, 40)).requires_grad_()
    factor = torch.full((), 2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((CHAINS[name](x) * factor).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), factor)
    assert second.item() == (gradient / 2).sum().item()


@needs_library
@pytest.mark.parametrize("name", CHAINS)
def test_strides_of_a_gradient_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = values((48, 40)) * 2, values((40, 48), 2).t()
    grad[3, 5], grad[7] = float("inf"), float("nan")
    found = [with_gradient(CHAINS[name], x, each)[1] for each in (grad, grad.contiguous())]
    without_kernels(monkeypatch)
    want = with_gradient(CHAINS[name], x, grad)[1]
    for each in found:
        assert torch.equal(each.nan_to_num(9e9), want.nan_to_num(9e9))


@needs_library
def test_slices_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values((50, 40))
    part = whole[1:-1]
    assert kernels.is_supported(part)
    y = fake_quantize(part, AMAX)
    without_kernels(monkeypatch)
    assert torch.equal(bits(y), bits(fake_quantize(part, AMAX)))


@needs_library
def test_checkpointing_computes_the_same() -> None:
    x = values((48, 40))

    def loss(x: Tensor) -> Tensor:
        return sum((function(x * 2).square() for function in CHAINS.values()), torch.zeros(()))

    def again(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(loss, x, use_reentrant=False)
        return y

    for got, want in zip(with_gradient(again, x, values((48, 40), 2)),
                         with_gradient(loss, x, values((48, 40), 2)), strict=True):  # fmt: skip
        assert torch.equal(got, want)


@needs_library
@pytest.mark.parametrize("name", ["activation", "mask", "masked weight"])
def test_tensors_without_memory_of_their_own(name: str) -> None:
    function, x = CHAINS[name], values((48, 40))
    want = function(x)
    assert torch.equal(make_fx(function)(x)(x), want), "a graph of what torch has seen"
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert function(x).shape == x.shape
    negative = torch._neg_view(x)
    assert torch.equal(function(negative), function(negative.clone()))


@needs_library
def test_a_batch_of_gradients() -> None:
    x = values((48, 40))
    leaf = x.clone().requires_grad_()
    (grads,) = torch.autograd.grad(fake_quantize(leaf, AMAX), leaf, torch.stack([x, x]), is_grads_batched=True)
    (grad,) = torch.autograd.grad(fake_quantize(leaf, AMAX), leaf, x)
    assert torch.equal(grads, torch.stack([grad, grad]))


@needs_library
def test_masks_under_functionalization() -> None:
    x = values((4, 8))
    found = torch.func.functionalize(lambda x: nm_mask(x, Pattern(2, 4)))(x)
    assert torch.equal(found, nm_mask(x, Pattern(2, 4)))


@needs_library
def test_a_float64_amax_is_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, amax = values((48, 40)), AMAX.double() / 3
    y = fake_quantize(x, amax)
    without_kernels(monkeypatch)
    assert torch.equal(y, fake_quantize(x, amax))


@needs_library
@pytest.mark.parametrize("exponent", [-149, -100, -13, 0, 1, 127])
def test_histograms_of_powers_of_two(exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = torch.tensor(2.0).pow(exponent)
    x = torch.stack([edge, edge.nextafter(torch.tensor(0.0)), -edge / 2, torch.tensor(0.0)])
    with monkeypatch.context() as patched:
        ours, theirs = Histogram(), Histogram()
        ours.observe(x)
        without_kernels(patched)
        theirs.observe(x)
    assert torch.equal(ours.counts, theirs.counts)
    assert ours.exponent == theirs.exponent


@needs_library
def test_what_the_kernels_do_not_support() -> None:
    x = values((8, 8))
    assert kernels.is_supported(x, x > 0)
    assert kernels.is_supported(nn.Parameter(x))
    assert not kernels.is_supported(x.t())
    assert not kernels.is_supported(x.bfloat16())
    assert not kernels.is_supported(x > 0), "scores of bools are no floats"
    assert not kernels.is_supported(x, x)
    assert not kernels.is_supported(x.to("meta"))
    assert not kernels.is_supported(x.as_subclass(type("Other", (Tensor,), {})))
    torch.set_num_threads(2)
    try:
        assert not kernels.is_supported(x), "torch's own operators use all threads"
    finally:
        torch.set_num_threads(1)


def no_library() -> Path:
    raise SqatError("this installation of sqat has no compiled runtime", code="missing-package")


def test_an_installation_without_the_library_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "library", no_library)
    kernels.load_kernels.cache_clear()
    try:
        assert kernels.load_kernels() is None
        assert fake_quantize(torch.tensor([1.0]), torch.tensor(127.0)).tolist() == [1.0]
    finally:
        kernels.load_kernels.cache_clear()


def test_a_library_without_a_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "instruction_set", lambda: "scalar")
    monkeypatch.setattr(runtime, "load", SimpleNamespace)
    kernels.load_kernels.cache_clear()
    try:
        assert kernels.load_kernels() is None
    finally:
        kernels.load_kernels.cache_clear()


@needs_library
def test_an_unknown_instruction_set_means_the_portable_loops(tmp_path: Path) -> None:
    own = tmp_path / "other.so"
    shutil.copy(runtime.library(), own)
    with patch.dict(os.environ, {"SQAT_RUNTIME_ISA": "sse9"}):
        assert check(own) == len(SIZES)
