"""MiniLM losses against a float64 loop over samples, heads and positions."""

import math

import pytest
import torch
from torch import Tensor

from sqat.distillation.minilm_v1 import MiniLMv1
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.distillation.relations import QKV

PAIRS = {
    MiniLMv1: [("query", "key"), ("value", "value")],
    MiniLMv2: [("query", "query"), ("key", "key"), ("value", "value")],
}
LOSSES = [MiniLMv1(), MiniLMv2(relation_heads=4)]
RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def projections(seed: int, width: int, heads: int = 4, tokens: int = 5, dtype: torch.dtype = torch.float32) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 3, tokens, width, generator=generator, dtype=torch.float64).mul(1.5).to(dtype).unbind(0)
    return QKV(q, k, v, heads)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def relation_row(a: list[float], rows: list[list[float]]) -> list[float]:
    return softmax([sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(len(a)) for b in rows])


def loss_by_loop(student: QKV, teacher: QKV, mask: Tensor, pairs: list[tuple[str, str]], heads: int) -> float:
    losses = []
    for sample, real in enumerate(mask.bool()):
        total = 0.0
        for first, second in pairs:
            for head in range(heads):
                rows = []
                for qkv in (student, teacher):
                    depth = qkv.query.shape[2] // heads
                    part = slice(head * depth, (head + 1) * depth)
                    a = getattr(qkv, first)[sample, real, part].double().tolist()
                    b = getattr(qkv, second)[sample, real, part].double().tolist()
                    rows.append([relation_row(query, b[: t + 1] if qkv.causal else b) for t, query in enumerate(a)])
                for s, t in zip(*rows, strict=True):
                    total += sum(q * math.log(q / p) for p, q in zip(s, t, strict=True))
        losses.append(total / (heads * int(real.sum())))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("width", [8, 24])
def test_loss_equals_the_loop(loss, width):
    student, teacher = projections(0, width), projections(1, 16)
    expected = loss_by_loop(student, teacher, RIGHT, PAIRS[type(loss)], heads=4)
    assert expected > 0.1
    assert float(loss(student, teacher, RIGHT)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_decoder_is_compared_up_to_each_position(loss):
    student, teacher = (projections(seed, width)._replace(causal=True) for seed, width in ((20, 8), (21, 16)))
    expected = loss_by_loop(student, teacher, RIGHT, PAIRS[type(loss)], heads=4)
    assert expected > 0.1
    assert float(loss(student, teacher, RIGHT)) == pytest.approx(expected, rel=1e-5)
    whole = [qkv._replace(causal=False) for qkv in (student, teacher)]
    assert float(loss(*whole, RIGHT)) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_later_tokens_do_not_change_a_decoders_loss(loss):
    """The same texts, cut: the sum over the kept positions does not change, on whichever side the padding is."""
    student, teacher = (projections(seed, 8)._replace(causal=True) for seed in (22, 23))
    cut = torch.tensor([[1, 1, 1, 0, 0]]).expand(3, 5)
    want = loss(*(QKV(*(x[:, :3] for x in qkv[:3]), 4, True) for qkv in (student, teacher)), cut[:, :3])
    assert float(loss(student, teacher, cut)) == pytest.approx(float(want), rel=1e-6)
    left = [QKV(*(x.roll(2, 1) for x in qkv[:3]), 4, True) for qkv in (student, teacher)]
    assert float(loss(*left, cut.flip(1))) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_decoder_does_not_learn_from_an_encoder(loss):
    with pytest.raises(ValueError, match="the student is a decoder and the teacher is not"):
        loss(projections(0, 8)._replace(causal=True), projections(1, 8), RIGHT)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_relation_heads_split_the_width_anew(heads):
    student, teacher = projections(2, 8, heads=2), projections(3, 16, heads=4)
    expected = loss_by_loop(student, teacher, RIGHT, PAIRS[MiniLMv2], heads)
    assert float(MiniLMv2(relation_heads=heads)(student, teacher, RIGHT)) == pytest.approx(expected, rel=1e-5)


def flipped(qkv: QKV) -> QKV:
    return QKV(qkv.query.flip(1), qkv.key.flip(1), qkv.value.flip(1), qkv.heads)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_left_padding_gives_the_same_loss(loss):
    student, teacher = projections(4, 8), projections(5, 16)
    right = loss(student, teacher, RIGHT)
    left = loss(flipped(student), flipped(teacher), RIGHT.flip(1).bool())
    assert float(left) == pytest.approx(float(right), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_values_at_padding_do_not_matter(loss):
    student, teacher = projections(6, 8), projections(7, 16)
    clean = loss(student, teacher, RIGHT)
    for qkv in (student, teacher):
        for x in qkv[:3]:
            x[RIGHT == 0] = 1e4
    student.query.requires_grad_()
    dirty = loss(student, teacher, RIGHT)
    dirty.backward()
    assert dirty.item() == pytest.approx(float(clean), rel=1e-6)
    assert student.query.grad is not None
    assert student.query.grad[RIGHT == 0].abs().max() == 0
    assert student.query.grad[RIGHT == 1].abs().max() > 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_identical_projections_cost_nothing(loss):
    student = projections(8, 16)
    assert float(loss(student, projections(8, 16), RIGHT)) == 0.0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_gradients_are_the_numeric_ones(loss):
    teacher = projections(9, 8, dtype=torch.float64)
    q, k, v, *_ = projections(10, 8, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: loss(QKV(*qkv, 4), teacher, RIGHT), inputs)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_descent_brings_the_student_to_the_teacher(loss):
    teacher, student = projections(11, 16), projections(12, 8)
    parameters = [x.requires_grad_() for x in student[:3]]
    before = loss(student, teacher, RIGHT).item()
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        loss(student, teacher, RIGHT).backward()
        optimizer.step()
    assert loss(student, teacher, RIGHT).item() < before / 2


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = projections(13, 8), projections(14, 16)
    for x in (*student[:3], *teacher[:3]):
        x.requires_grad_()
    loss(student, teacher, RIGHT).backward()
    assert all(x.grad is None for x in teacher[:3])
    assert all(x.grad is not None for x in student[:3])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_autocast_computes_in_float32(loss):
    student, teacher = projections(15, 8), projections(16, 16)
    plain = loss(student, teacher, RIGHT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher, RIGHT), plain)
    half = QKV(*(x.bfloat16() for x in student[:3]), 4)
    same = QKV(*(x.bfloat16().float() for x in student[:3]), 4)
    assert loss(half, teacher, RIGHT).dtype == torch.float32
    assert torch.equal(loss(half, teacher, RIGHT), loss(same, teacher, RIGHT))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_extreme_scores_stay_finite(loss):
    student = QKV(*(x.mul(300).requires_grad_() for x in projections(17, 8)[:3]), 4)
    teacher = QKV(*(x.mul(300) for x in projections(18, 16)[:3]), 4)
    value = loss(student, teacher, RIGHT)
    value.backward()
    assert value.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in student[:3])


def test_v1_needs_equal_head_counts():
    with pytest.raises(ValueError, match="2 in the student and 4 in the teacher"):
        MiniLMv1()(projections(0, 8, heads=2), projections(1, 16, heads=4), RIGHT)


def test_relation_heads_default_to_those_of_the_teacher():
    student, teacher = projections(0, 8), projections(1, 8)
    expected = MiniLMv2(relation_heads=teacher.heads)(student, teacher, RIGHT)
    assert float(MiniLMv2()(student, teacher, RIGHT)) == float(expected)


def test_relation_heads_must_divide_both_widths():
    with pytest.raises(ValueError, match="3 relation heads do not divide the student's query width 8"):
        MiniLMv2(relation_heads=3)(projections(0, 8), projections(1, 12), RIGHT)
    with pytest.raises(ValueError, match="8 relation heads do not divide the teacher's query width 12"):
        MiniLMv2(relation_heads=8)(projections(0, 8), projections(1, 12), RIGHT)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MiniLMv2(relation_heads=0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"teacher query \(3, 4, 16\) does not fit the attention mask \(3, 5\)"):
        MiniLMv1()(projections(0, 8), projections(1, 16, tokens=4), RIGHT)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_sample_without_tokens_adds_nothing(loss):
    student, teacher = projections(19, 8), projections(20, 16)
    empty = RIGHT.clone()
    empty[1] = 0
    two = [QKV(*(x[[0, 2]] for x in qkv[:3]), 4) for qkv in (student, teacher)]
    assert loss(student, teacher, empty).item() == pytest.approx(loss(*two, RIGHT[[0, 2]]).item() * 2 / 3)
