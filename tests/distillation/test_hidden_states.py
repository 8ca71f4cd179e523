"""SquareHead on tensors against a float64 loop over layers, samples and positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sqat.distillation.hidden_states import hidden_loss

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def layers(seed: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states of other sizes in each layer, [3, 5, 4]."""
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 5, 4, generator=draw, dtype=torch.float64) * 10**n).to(dtype) for n in range(count)]


def loss_by_loop(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> float:
    total = 0.0
    for x, y in zip(student, teacher, strict=True):
        error = size = count = 0.0
        for sample in range(3):
            for token in range(5):
                if mask[sample, token]:
                    for a, b in zip(x[sample, token].tolist(), y[sample, token].tolist(), strict=True):
                        error, size, count = error + (a - b) ** 2, size + b**2, count + 1
        total += (error / count) / (size / count)
    return total


def test_the_loss_is_the_loops() -> None:
    student, teacher = layers(0), layers(1)
    expected = loss_by_loop(student, teacher, MASK)
    assert expected > 1
    assert float(hidden_loss(student, teacher, MASK)) == pytest.approx(expected, rel=1e-5)
    every = float(hidden_loss(student, teacher, None))
    assert every == pytest.approx(loss_by_loop(student, teacher, torch.ones(3, 5)), rel=1e-5)
    assert every != pytest.approx(expected, rel=1e-3)


def test_a_layer_counts_by_its_relative_error() -> None:
    """Half of every hidden state is missing: a quarter for each layer, however large it is."""
    teacher = layers(2)
    assert float(hidden_loss([x / 2 for x in teacher], teacher, MASK)) == pytest.approx(0.75)
    assert float(hidden_loss(teacher, teacher, MASK)) == 0.0


def test_values_at_padding_do_not_matter() -> None:
    student, teacher = layers(3), layers(4)
    clean = float(hidden_loss(student, teacher, MASK))
    for x in (*student, *teacher):
        x[MASK == 0] = torch.inf
    student[0].requires_grad_()
    dirty = hidden_loss(student, teacher, MASK)
    dirty.backward()
    assert float(dirty.detach()) == pytest.approx(clean, rel=1e-6)
    assert student[0].grad is not None
    assert torch.isfinite(student[0].grad).all()
    assert not student[0].grad[MASK == 0].any()


def test_gradients_are_those_of_finite_differences_and_the_teacher_gets_none() -> None:
    student = [x.requires_grad_() for x in layers(5, dtype=torch.float64)]
    teacher = [x.requires_grad_() for x in layers(6, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *xs: hidden_loss(xs, teacher, MASK), student)
    hidden_loss(student, teacher, MASK).backward()
    assert all(x.grad is None for x in teacher)


def test_bf16_is_summed_in_fp32() -> None:
    student, teacher = layers(7), layers(8)
    half = [[x.bfloat16() for x in xs] for xs in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        found = hidden_loss(*half, MASK)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(loss_by_loop(*half, MASK), rel=1e-5)


def test_other_layers_or_widths_are_a_broken_contract() -> None:
    with pytest.raises(ValueError, match="as many layers, got 3 in the student and 2 in the teacher"):
        hidden_loss(layers(0), layers(1, 2), MASK)
    with pytest.raises(ValueError, match=r"\[3, 5, 4\] in the student and \[3, 5, 2\] in the teacher after block 1"):
        hidden_loss(layers(0, 2), [layers(1)[0], torch.ones(3, 5, 2)], MASK)
