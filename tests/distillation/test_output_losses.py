"""Losses of outputs against loops over queries, pairs and texts in float64, and against their gradients on paper."""

from __future__ import annotations

import math
from itertools import combinations
from typing import get_args

import pytest
import torch
from torch import Tensor

from sqat.distillation import LIST_LOSSES, OutputLossName
from sqat.distillation.outputs import OUTPUT_LOSSES
from sqat.recipe.tasks import TASKS
from sqat.tasks.classification import Classification
from sqat.tasks.query_performance import QueryPerformance
from sqat.tasks.relevance import Relevance
from sqat.tasks.retrieval import Retrieval
from sqat.tasks.text_to_image import TextToImage

GROUPS = torch.tensor([4, 4, 7, 9, 9, 9, 9])  # a query of two, of one, and of four passages
NONE = torch.full((3,), -1)


def scores(seed: int) -> Tensor:
    return torch.randn(7, 1, generator=torch.Generator().manual_seed(seed)) * 2


def vectors(seed: int, width: int = 6) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def kl(target: list[float], actual: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(target), softmax(actual), strict=True))


def queries(values: Tensor) -> list[list[float]]:
    flat = values.double().flatten().tolist()
    return [[flat[row] for row in range(7) if GROUPS[row] == group] for group in (4, 7, 9)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_listwise_is_the_kl_within_each_query(temperature: float) -> None:
    student, teacher = scores(0), scores(1)
    pairs = zip(queries(teacher / temperature), queries(student / temperature), strict=True)
    expected = sum(kl(target, actual) for target, actual in pairs) / 2 * temperature**2  # one passage has no list
    found = OUTPUT_LOSSES["listwise"](student, teacher, GROUPS, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1
    order = torch.randperm(7)
    mixed = OUTPUT_LOSSES["listwise"](student[order], teacher[order], GROUPS[order], temperature)
    assert float(mixed) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_listwise_is_the_difference_of_the_distributions() -> None:
    student, teacher = scores(2).requires_grad_(), scores(3).requires_grad_()
    OUTPUT_LOSSES["listwise"](student, teacher, GROUPS, 2.0).backward()
    own, target = (queries(each.detach() / 2) for each in (student, teacher))
    expected = [(p - q) * 2 / 2 if len(mine) > 1 else 0.0  # T^2 / T, over two queries
                for mine, theirs in zip(own, target, strict=True)
                for p, q in zip(softmax(mine), softmax(theirs), strict=True)]  # fmt: skip
    assert student.grad is not None
    torch.testing.assert_close(student.grad.flatten(), torch.tensor(expected))
    assert teacher.grad is None


def test_margin_mse_is_the_squared_error_of_all_differences_in_a_query() -> None:
    student, teacher = scores(4), scores(5)
    errors = [((a - b) - (c - d)) ** 2
              for mine, theirs in zip(queries(student), queries(teacher), strict=True)
              for (a, c), (b, d) in combinations(zip(mine, theirs, strict=True), 2)]  # fmt: skip
    assert len(errors) == 7
    found = OUTPUT_LOSSES["margin-mse"](student, teacher, GROUPS, 5.0)
    assert float(found) == pytest.approx(sum(errors) / 7, rel=1e-5)
    moved = teacher + GROUPS[:, None].float()  # a query's scores may all be higher
    assert float(OUTPUT_LOSSES["margin-mse"](student, moved, GROUPS, 1.0)) == pytest.approx(sum(errors) / 7, rel=1e-4)


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_queries_of_one_passage_give_a_gradient_of_zero(name: str) -> None:
    student = scores(6).requires_grad_()
    loss = OUTPUT_LOSSES[name](student, scores(7), torch.arange(7), 1.0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_similarities_are_the_kl_of_cosines_to_the_other_texts(temperature: float) -> None:
    student, teacher = vectors(0), vectors(1, width=9)
    rows = []
    for every in (student.double().tolist(), teacher.double().tolist()):
        cosines = [[cosine(own, other) / temperature for other in every if other is not own] for own in every]
        rows.append(cosines)
    expected = sum(kl(target, actual) for actual, target in zip(*rows, strict=True)) / 5
    with torch.autocast("cpu", torch.bfloat16):
        found = OUTPUT_LOSSES["similarities"](student, teacher, NONE, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    turned = vectors(1, width=9) @ torch.linalg.qr(torch.randn(9, 9))[0]
    assert float(OUTPUT_LOSSES["similarities"](turned, 3 * teacher, NONE, temperature)) < 1e-5


def test_one_text_alone_has_no_similarities() -> None:
    student = vectors(2)[:1].requires_grad_()
    OUTPUT_LOSSES["similarities"](student, vectors(3)[:1], NONE, 0.05).backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_l2_is_the_mean_distance_and_has_a_gradient_where_it_is_zero() -> None:
    student, teacher = vectors(4), vectors(5)
    expected = sum(math.dist(a, b) for a, b in zip(student.tolist(), teacher.tolist(), strict=True)) / 5
    assert float(OUTPUT_LOSSES["l2"](student, teacher, NONE, 1.0)) == pytest.approx(expected, rel=1e-5)
    same = teacher.clone().requires_grad_()
    OUTPUT_LOSSES["l2"](same, teacher, NONE, 1.0).backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


def test_cosine_is_one_minus_cosine_whatever_the_length() -> None:
    student, teacher = torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([[5.0, 0], [1, 0]])
    assert OUTPUT_LOSSES["cosine"](student, teacher, NONE, 1.0).item() == pytest.approx(0.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_that_of_softened_classes(temperature: float) -> None:
    student, teacher = vectors(6), vectors(7)
    pairs = zip((teacher / temperature).tolist(), (student / temperature).tolist(), strict=True)
    expected = sum(kl(target, actual) for target, actual in pairs) / 5 * temperature**2
    assert float(OUTPUT_LOSSES["kl"](student, teacher, NONE, temperature)) == pytest.approx(expected, rel=1e-5)


def test_mse_is_the_mean_of_squares_without_a_temperature() -> None:
    pictures = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 3.0)
    assert float(OUTPUT_LOSSES["mse"](*pictures, NONE, 7.0)) == 9.0
    assert float(OUTPUT_LOSSES["mse"](torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1), NONE, 1.0)) == 0.5


def test_every_name_has_a_function_and_every_task_its_names() -> None:
    assert list(OUTPUT_LOSSES) == list(get_args(OutputLossName))
    tasks = {"classification": Classification(("a", "b")), "query-performance": QueryPerformance(),
             "relevance": Relevance(), "retrieval": Retrieval(), "text-to-image": TextToImage()}  # fmt: skip
    defaults = {"classification": "kl", "query-performance": "mse", "relevance": "mse", "retrieval": "cosine",
                "text-to-image": "mse"}  # fmt: skip
    for name, task in tasks.items():
        assert task.output_losses == TASKS[name].output_losses
        assert task.output_losses[0] == defaults[name]
