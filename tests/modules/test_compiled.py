"""torch.compile of a model with masks and quantizers: the same loss and gradients, in one graph."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from sqat.modules.activation_quantizers import Quantizers, insert_quantizers_
from sqat.modules.parametrize import insert_weights_
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import Pattern

BACKENDS = [
    "aot_eager",  # forward and backward are traced and run as they are, without a compiler
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")],
    ),
]
Found = tuple[Tensor, list[Tensor | None]]


class Pair(nn.Module):
    """Two linears that read one tensor, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(nn.functional.gelu(self.left(x)) * self.right(x))
        return y


def quantized_pair() -> Pair:
    """The model with int8 weights and inputs, one weight pruned too; some values lie beyond the amax."""
    torch.manual_seed(0)
    model = Pair()
    amax = {"left:input": torch.tensor(1.5), "last:input": torch.tensor(0.1)}
    shared_with = {"left:input": "left:input", "right:input": "left:input", "last:input": "last:input"}
    insert_quantizers_(model, Quantizers(amax, shared_with), [])
    masks = {"left": nm_mask(model.left.weight.detach().abs(), Pattern(2, 4))}
    insert_weights_(model, masks, ["left", "right", "last"])
    return model


def loss_and_gradients(model: nn.Module, of: nn.Module, x: Tensor) -> Found:
    """Loss of a model, compiled or not, and the gradients it leaves in ``of``."""
    of.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in of.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_is_the_same(backend: str) -> None:
    model, x = quantized_pair(), torch.randn(4, 6, 16)
    loss, wanted = loss_and_gradients(model, model, x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        got, found = loss_and_gradients(compiled, model, x)
        torch.testing.assert_close(got, loss)
        for gradient, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert not torch._dynamo.utils.counters["graph_break"]
